"""The key of a kept step: whatever can make a difference makes another key, or a model that has to be traced."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from tensor_forms import FORMS
from tiny_models import tiny
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import autodeploy as ad
from autodeploy.graph.meta import CONSTANT
from autodeploy.inductor import machine
from autodeploy.inductor.step_cache import environment_key, graph_key
from autodeploy.inductor.stock import stock_key
from autodeploy.kernels import registry
from autodeploy.ops import linear
from passes import InsertCachedAttention, ShareMetadata, default

CPU = torch.device("cpu")


def llama(**changes: Any) -> PreTrainedModel:
    """A llama of its own, with one layer; `changes` are of its configuration."""
    model = tiny("llama", 1)
    if not changes:
        return copy.deepcopy(model)
    changed = copy.deepcopy(model.config)
    changed.update(changes)
    return type(model)(changed).eval()


# What may differ between two models of one class; each function changes a model, or gives another.


def another_activation(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def another_configuration(model: PreTrainedModel) -> PreTrainedModel:
    return llama(rms_norm_eps=1e-3)


def scaling(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def forward_hook(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)


def forward_pre_hook(model: PreTrainedModel) -> None:
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def forward_of_an_instance(model: PreTrainedModel) -> None:
    norm = model.model.norm
    norm.forward = lambda hidden: type(norm).forward(norm, hidden) * 2


def closure(model: PreTrainedModel, factor: float = 3.0) -> None:
    def forward(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * factor

    model.model.norm.forward = types.MethodType(forward, model.model.norm)


def class_without_a_file(model: PreTrainedModel, factor: float = 3.0) -> None:
    """As a notebook has it: the same name, edited."""
    names: dict[str, Any] = {"nn": nn}
    exec(f"class Norm(nn.Module):\n def forward(self, hidden): return hidden * {factor}", names)
    model.model.norm = names["Norm"]()


FACTOR = 3.0


class Scaled(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * FACTOR


def class_of_a_user(model: PreTrainedModel) -> None:
    model.model.norm = Scaled()


class Added(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.tensor([value])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.value


def tensor_that_is_not_registered(model: PreTrainedModel) -> None:
    model.model.norm = Added(0.5)


def parametrized(model: PreTrainedModel) -> None:
    parametrize.register_parametrization(model.lm_head, "weight", nn.Tanh())


def tied(model: PreTrainedModel) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def dtype_of_one_weight(model: PreTrainedModel) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data.double()


def strides_of_one_weight(model: PreTrainedModel) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()


def order_of_layers(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(tiny("llama", 2))
    layers = model.model.layers
    layers._modules = dict(reversed(layers._modules.items()))
    return model


def one_more_layer(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(tiny("llama", 2))


MODELS = [
    another_activation,
    another_configuration,
    scaling,
    forward_hook,
    forward_pre_hook,
    forward_of_an_instance,
    closure,
    class_without_a_file,
    class_of_a_user,
    tensor_that_is_not_registered,
    parametrized,
    tied,
    dtype_of_one_weight,
    strides_of_one_weight,
    order_of_layers,
    one_more_layer,
]


def keys(model: PreTrainedModel) -> tuple[str | None, str]:
    """Of the shortcut and of the graph."""
    return stock_key(model, ""), graph_key(ad.trace(model), model, "")


@pytest.fixture(scope="module")
def plain() -> tuple[str | None, str]:
    return keys(llama())


@pytest.mark.parametrize("change", MODELS, ids=lambda change: change.__name__)
def test_a_changed_model_has_another_key(change: Callable[..., Any], plain: tuple[str | None, str]) -> None:
    model = llama()
    stock, graph = keys(change(model) or model)
    assert stock != plain[0]
    assert graph != plain[1]


def test_a_copy_has_the_same_keys(plain: tuple[str | None, str]) -> None:
    """Other values of weights are no difference: a step takes them as inputs."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert keys(model) == plain
    assert plain[0] is not None


def test_other_models_in_the_process_are_no_difference(plain: tuple[str | None, str]) -> None:
    for model_type in ("gpt2", "gpt_oss", "lfm2"):
        tiny(model_type, 1)
    assert stock_key(llama(), "") == plain[0]


def test_an_edited_class_and_a_users_constant_have_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    edited = [llama(), llama()]
    for model, factor in zip(edited, (3.0, 4.0), strict=True):
        class_without_a_file(model, factor)
    found = [keys(model)[1] for model in edited]
    for factor in (0.0, -0.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        model = llama()
        class_of_a_user(model)
        found.append(keys(model)[1])
    assert len(set(found)) == 4


def _rotated(*args: Any, **kwargs: Any) -> Any:
    return modeling_qwen3.rotate_half(*args, **kwargs) * 2


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (modeling_llama, "rotate_half", _rotated),
        (modeling_llama.LlamaMLP, "forward", lambda self, hidden: hidden),
        (modeling_llama.LlamaMLP, "forward", modeling_qwen3.Qwen3RMSNorm.forward),
        (torch, "rsqrt", lambda value: value),
        (torch, "rsqrt", torch.sqrt),
        (torch.Tensor, "pow", torch.Tensor.mul),
        (nn.Linear, "forward", lambda self, hidden: hidden),
        (ALL_ATTENTION_FUNCTIONS, "_local_mapping", {"eager": _rotated}),
        (modeling_llama.LlamaPreTrainedModel, "config_class", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_that_was_replaced_is_no_stock(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any) -> None:
    model = llama()
    before = stock_key(model, "")
    monkeypatch.setattr(owner, name, value, raising=False)
    after = stock_key(model, "")
    monkeypatch.undo()
    assert before is not None
    assert before != after
    assert before == stock_key(model, "")


def test_hooks_of_all_modules_are_no_stock() -> None:
    with nn.modules.module.register_module_forward_hook(lambda *args: None):
        assert stock_key(llama(), "") is None


# What may differ between two processes and machines.


@contextmanager
def matmul_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield


PROCESSES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "matmul precision": matmul_precision,
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "number of threads": num_threads,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "Inductor's configuration": lambda: config.patch(epilogue_fusion=False),
    "vector width": lambda: config.patch({"cpp.simdlen": 256}),
    "a pass given to Inductor": lambda: config.patch(post_grad_custom_pre_pass=_rotated),
    "functorch's configuration": lambda: functorch_config.patch(functionalize_rng_ops=True),
    "instruction set, asked for": lambda: variable("ATEN_CPU_CAPABILITY", "avx2"),
    "instruction set, of the CPU": lambda: patched(machine, "_cpu_flags", lambda: "flags : sse"),
    "compiler": lambda: patched(machine, "_compiler", lambda: ("clang++", "21")),
    "transformers' settings": lambda: variable("USE_HUB_KERNELS", "no"),
    "transformers' version": lambda: patched(__import__("transformers"), "__version__", "4.0"),
    "torch's version": lambda: patched(torch, "__version__", "1.0"),
    "our sources": lambda: patched(machine, "sources_hash", lambda package: "edited"),
    "a provider": lambda: patched(registry, "_added", {"attention/mine": Mine(16)}),
    "a provider of linear layers": lambda: patched(linear, "providers", [*linear.providers, Mine(16)]),
}


class Mine:
    """Stands for a third party's backend: state, and code that reads a global."""

    name, kind = "mine", "attention"

    def __init__(self, block: int) -> None:
        self.block = block

    def call(self, value: float) -> float:
        return value * FACTOR


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_another_process_or_machine_has_another_key(process: Callable[[], AbstractContextManager[Any]]) -> None:
    before = environment_key(CPU, default())
    with process():
        assert environment_key(CPU, default()) != before
    assert environment_key(CPU, default()) == before


def test_passes_and_their_options_are_in_the_key() -> None:
    lists = [default(), default("sdpa"), default(page_size=8), default()[:-1], [*default(), ShareMetadata()]]
    lists += [[InsertCachedAttention({"attention": "sdpa", "causal_conv1d": "torch_conv1d"})]]
    assert len({environment_key(CPU, passes) for passes in lists}) == len(lists)


# Graphs.


def traced(function: Callable[..., Any], **constants: torch.Tensor) -> fx.GraphModule:
    gm = fx.symbolic_trace(function)
    for name, value in constants.items():
        gm.register_buffer(name, value)
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.get_attr(name)
    return gm


ONES = torch.ones(2, 2)
GRAPHS = [
    traced(lambda x: torch.ops.aten.add.Tensor(x, 1)),
    traced(lambda x: torch.ops.aten.add.Tensor(x, 1.0)),
    traced(lambda x: torch.ops.aten.add.Tensor(x, True)),
    traced(lambda x: torch.ops.aten.add.Tensor(1, x)),
    traced(lambda x: torch.ops.aten.add.Tensor(x, 1, alpha=1)),
    traced(lambda x: torch.ops.aten.mul.Tensor(x, 1)),
    traced(lambda y: torch.ops.aten.add.Tensor(y, 1)),
    traced(lambda x: x, a=torch.ones(2, 2), b=torch.ones(2, 2)),
    traced(lambda x: x, a=torch.ones(2, 2), b=torch.zeros(2, 2)),
    traced(lambda x: x, a=torch.ones(2, 2), b=torch.ones(2, 2).t()),
    traced(lambda x: x, a=torch.ones(2, 2), b=torch.ones(4)),
    traced(lambda x: x, a=torch.ones(2, 2), b=torch.ones(2, 2, dtype=torch.int32)),
    traced(lambda x: x, a=ONES, b=ONES),
    traced(lambda x: x, a=ONES, b=ONES.t()),
    traced(lambda x: x, b=ONES, a=ONES),
]


def test_different_graphs_have_different_keys() -> None:
    assert len({graph_key(gm, nn.Module(), "") for gm in GRAPHS}) == len(GRAPHS)
    owned = nn.Module()
    owned.register_buffer("a", ONES)
    before = graph_key(GRAPHS[-3], owned, "")
    assert before != graph_key(GRAPHS[-3], nn.Module(), "")
    CONSTANT.set(next(iter(GRAPHS[-3].graph.find_nodes(op="get_attr"))), True)
    assert before != graph_key(GRAPHS[-3], owned, "")


def test_models_whose_tensors_differ_in_anything_but_their_values_have_different_keys() -> None:
    keys = []
    for value in FORMS.values():
        model = nn.Module()
        model.register_parameter("a", value) if isinstance(value, nn.Parameter) else model.register_buffer("a", value)
        keys.append(graph_key(traced(lambda x: x, a=value), model, ""))
    assert len(set(keys)) == len(FORMS)


@pytest.mark.parametrize("line", ["flags\t\t: fpu sse avx2", "Features\t: fp asimd sve"])
def test_the_instructions_of_a_cpu_are_known_by_its_own_words(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x86 and Arm."""
    text = f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda path: text)
    assert machine._cpu_flags() == line
