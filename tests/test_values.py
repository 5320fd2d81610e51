"""The typed graph: recorded values are right before and after every pass, at the sizes traced and at real ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from ragged import make_batch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from traces import before, traced

import autodeploy as ad
from autodeploy.compiler import pipeline, spec
from autodeploy.errors import InvariantError
from autodeploy.graph import outline, sizes, values
from autodeploy.graph.edit import PREPARE, Pass, copy_module, get_attribute, placeholders, prepare_nodes, record
from autodeploy.graph.meta import SITE, VALUE
from autodeploy.inductor import torch_compile as dynamo
from autodeploy.kernels.registry import catalogue
from autodeploy.metadata import fields
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS, LayoutSpec
from autodeploy.metadata.nest import Nested, nest_sequences
from autodeploy.ops.cache import PoolSizes
from passes import ShareMetadata, default

aten = torch.ops.aten


@dataclass(frozen=True)
class Lie:
    """A pass that changes nothing but a recorded value."""

    tell: Callable[[fx.GraphModule], object]
    name: str = "liar"

    def apply(self, gm: fx.GraphModule) -> int:
        self.tell(gm)
        return 1


def attention(gm: fx.GraphModule) -> fx.Node:
    return next(node for node in gm.graph.nodes if SITE.on(node) and VALUE.on(node))


def remember(gm: fx.GraphModule, change: Callable[[Tensor], Tensor]) -> None:
    node = attention(gm)
    with VALUE.of(node).fake_mode:
        VALUE.set(node, change(VALUE.of(node)))


def forget_inside(gm: fx.GraphModule) -> None:
    VALUE.take(getattr(gm, PREPARE).graph.output_node().all_input_nodes[0])


def lie_inside(gm: fx.GraphModule) -> None:
    node = getattr(gm, PREPARE).graph.output_node().all_input_nodes[0]
    with VALUE.of(node).fake_mode:
        VALUE.set(node, VALUE.of(node).double())


def lie_about_a_number(gm: fx.GraphModule) -> None:
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    VALUE.set(node, VALUE.of(node) + 1)


def use_another_mode(gm: fx.GraphModule) -> None:
    with values.new_mode():
        VALUE.set(attention(gm), torch.empty(1))


@cache
def shared() -> fx.GraphModule:
    return before("lower_fields")


LIES: dict[str, tuple[Callable[[fx.GraphModule], object], str]] = {
    "no value": (lambda gm: VALUE.take(attention(gm)), "the value of sdpa_paged_attention_default is not recorded"),
    "no value inside": (forget_inside, r"the value of unsqueeze\w* is not recorded"),
    "dtype": (lambda gm: remember(gm, Tensor.double), "dtype torch.float64, where it is torch.float32"),
    "device": (lambda gm: remember(gm, lambda value: value.to("meta")), "device meta, where it is cpu"),
    "shape": (lambda gm: remember(gm, lambda value: value[:, 1:]), r"shape torch.Size\(\[1, s\d+ - 1, 4, 16\]\)"),
    "strides": (lambda gm: remember(gm, lambda value: value.mT.contiguous().mT), r"stride \(64\*s\d+, 64, 1, 4\)"),
    "inside": (lie_inside, "dtype torch.float64, where it is torch.float32"),
    "a number": (lie_about_a_number, r"s\d+ \+ 1, where it is s\d+"),
    "another mode": (use_another_mode, "a fake tensor of another mode"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_pass_that_drops_a_value_or_lies_is_named(lie: str) -> None:
    tell, message = LIES[lie]
    with pytest.raises(InvariantError, match=message) as caught:
        pipeline.run(copy_module(shared()), [Lie(tell)], [spec.ValueChecker()])
    assert caught.value.__notes__ == ["  pass:  liar"]
    assert caught.value.where.startswith("node ")


def test_a_graph_without_values_need_not_have_any() -> None:
    gm = fx.symbolic_trace(lambda ids, x: (x + ids.cumsum(0), x * ids.cumsum(0)))
    record = pipeline.run(gm, [ShareMetadata()], [spec.ValueChecker()])[0]
    assert values.missing(gm.graph)
    assert record.after.metadata_bytes.number == 0


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def test_what_reads_a_value_that_changed_is_made_again() -> None:
    gm = torch.export.export(_Function(lambda x: (x.t() + 1, x * 2)), (torch.zeros(3, 5),)).module(check_guards=False)
    (transposed,) = gm.graph.find_nodes(op="call_function", target=aten.t.default)
    new = record(transposed.next, lambda x: aten.clone.default(x, memory_format=torch.contiguous_format), transposed)
    stale = values.replace_node(transposed, new)
    assert [node.target for node in stale] == [aten.add.Tensor]
    with pytest.raises(InvariantError, match=r"stride \(1, 5\), where it is \(3, 1\)"):
        spec.check_values(gm)
    values.retype(gm.graph, stale)
    spec.check_values(gm)


def test_an_op_that_changes_the_shape_of_its_input_is_followed() -> None:
    def forward(x: Tensor) -> Tensor:
        return (x + 1).unsqueeze_(0) * 2

    gm = torch.export.export(_Function(forward), (torch.zeros(3, 5),)).module(check_guards=False)
    values.retype(gm.graph, list(gm.graph.nodes))
    spec.check_values(gm)
    assert VALUE.of(gm.graph.output_node().all_input_nodes[0]).shape == (1, 3, 5)


@pytest.mark.parametrize("model_type", ["gemma3_text", "lfm2"])
def test_packed_sizes_stay_free(model_type: str) -> None:
    gm = ad.apply(traced(model_type)).module
    env = values.mode_of(gm.graph).shape_env
    assert env.replacements == {}
    assert not any(isinstance(guard.expr, sympy.Eq) for guard in env.guards)
    names = ["T", "S", f"GP + {NUM_FIXED_COLUMNS}", "pages_0"]
    names.append("pages_1" if model_type == "gemma3_text" else "state_slots")
    shapes = [size for node in placeholders(gm) for size in VALUE.of(node).shape]
    assert set(map(sizes.text, shapes)) - set(map(str, range(100))) == set(names)


class RealRun(fx.Interpreter):
    """Runs a graph and compares each result with the recorded value at the real sizes."""

    def __init__(self, gm: fx.GraphModule, sizes_by_symbol: dict[Any, int]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.symbols = sizes_by_symbol

    def at_size(self, number: Any) -> Any:
        return int(number.node.expr.xreplace(self.symbols)) if isinstance(number, torch.SymInt) else number

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "output" or result is None:
            return result
        real, said = pytree.tree_leaves(result), pytree.tree_leaves(VALUE.of(n))
        assert len(real) == len(said)
        for one, other in zip(real, said, strict=True):
            if not isinstance(one, Tensor):
                assert one == self.at_size(other), n.name
                continue
            assert (one.dtype, one.device) == (other.dtype, other.device), n.name
            assert tuple(one.shape) == tuple(map(self.at_size, other.shape)), n.name
            # Kernels and fake tensors are not agreed on the stride of a dimension of one entry.
            strides = zip(one.shape, one.stride(), map(self.at_size, other.stride()), strict=True)
            assert all(stride == expected for size, stride, expected in strides if size != 1), n.name
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return RealRun(get_attribute(self.module, target), self.symbols).run(*args)


def nested_batch(lengths: Sequence[int], layout_spec: LayoutSpec) -> Nested:
    rows, pages = len(lengths), 3
    table = 1 + np.arange(rows * pages, dtype=np.int32).reshape(rows, pages)
    return nest_sequences(
        np.arange(sum(lengths)) % 100,
        list(lengths),
        [0] * rows,
        np.broadcast_to(table, (layout_spec.num_groups, rows, pages)),
        1 + np.arange(rows, dtype=np.int32),
        layout_spec,
        num_pages=[32] * layout_spec.num_groups,
        num_state_slots=8,
        pad_sequences=rows + 1,
        pad_tokens=sum(lengths) + 2,
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "lfm2"])
def test_values_and_bytes_are_those_of_a_real_step(model_type: str) -> None:
    """Every dtype, device, shape, stride and number of the finished graph and of prepare_metadata, and the ledger."""
    result = ad.apply(traced(model_type), passes=default()[:-2])
    gm, layout_spec = result.module, result.layout_spec
    step = nested_batch((17, 4, 1), layout_spec)
    pools = PoolSizes((32,) * layout_spec.num_groups, layout_spec.page_size, 8)
    caches = [torch.zeros(cache.whole(pools)) for cache in result.cache_specs]
    env = values.mode_of(gm.graph).shape_env
    num_pages = step.layout.shape[1] - NUM_FIXED_COLUMNS
    real = {"T": step.input_ids.numel(), "S": step.layout.shape[0], "GP": num_pages, "state_slots": 8}
    real |= {f"pages_{group}": 32 for group in range(layout_spec.num_groups)}
    run = RealRun(gm, {symbol: real[name] for name, symbol in env.source_to_var.items()})
    run.run(step.input_ids, step.layout, *caches)

    def evaluate(expression: str) -> int:
        return eval(expression, {}, real)

    ledger = result.report.ledger
    assert evaluate(ledger.bytes_sent.expression) == step.input_ids.nbytes + step.layout.nbytes
    inner = getattr(gm, PREPARE).graph
    outputs = inner.output_node().all_input_nodes
    said = sizes.bytes_of(tensor for node in outputs for tensor in values.tensors(node))
    assert evaluate(said.expression) == sum(tensor.nbytes for tensor in run.env[prepare_nodes(gm)[0]])


@pytest.mark.parametrize("field", catalogue(), ids=lambda field: field.name)
def test_the_value_of_a_field_is_what_it_makes(field: fields.Field) -> None:
    batch = make_batch([(3, 2), (1, 5), (4, 0)], num_groups=2, padding_rows=1, padding_tokens=2)
    known = {"page_size": 4, "num_groups": 2, "group": 1, "span": "window_5", "kernel_size": 4, "num_kv_heads": 3}
    known |= {"block_size": 4, "chunk_size": 3, "num_tokens": batch.num_tokens}
    parameters = [known[name] for name in list(inspect.signature(field.formula).parameters)[1:]]
    layout = batch.layout()
    got = field.op(layout, *parameters)

    graph, mode = fx.Graph(), values.new_mode()
    rows, pages = values.new_size(mode, "S", 33), values.new_size(mode, "GP", 36)
    node = graph.placeholder("layout")
    with mode:
        VALUE.set(node, torch.empty(rows, 3 + pages, dtype=torch.int32))
    output = graph.output(node)
    said = VALUE.of(record(output, field.op, node, *parameters))
    real = dict(zip(mode.shape_env.source_to_var.values(), (layout.shape[0], layout.shape[1] - 3), strict=True))
    at = RealRun(fx.GraphModule(torch.nn.Module(), graph), real).at_size
    assert (said.dtype, tuple(map(at, said.shape)), tuple(map(at, said.stride()))) == (
        got.dtype,
        tuple(got.shape),
        got.stride(),
    )


# Inductor's own imports use a deprecated part of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_graphs_of_torch_compile_stay_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = []

    def run(gm: fx.GraphModule, passes: Sequence[Pass], _: object) -> list[pipeline.PassRecord]:
        stages.append(spec.is_typed(gm))
        return RUN(gm, passes, [spec.ValueChecker()])

    def inline(gm: fx.GraphModule) -> None:
        outline.inline(gm)
        spec.check_values(gm)
        stages.append(spec.is_typed(gm))

    RUN = pipeline.run
    monkeypatch.setattr(dynamo.pipeline, "run", run)
    monkeypatch.setattr(dynamo, "inline", inline)

    def layers(x: Tensor, positions: Tensor) -> Tensor:
        for _ in range(2):
            mask = positions[:, None] >= positions[None, :]
            x = torch.where(mask, x @ x, 0) + positions.cumsum(0).float()
        return x

    torch._dynamo.reset()
    x, positions = torch.randn(9, 9), torch.arange(9)
    compiled = torch.compile(layers, backend="autodeploy", dynamic=True, fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        torch.testing.assert_close(compiled(x, positions), layers(x, positions))
    assert stages == [True, True]


def test_sizes_are_written_in_their_names() -> None:
    mode = values.new_mode()
    one, other = values.new_size(mode, "T", 34), values.new_size(mode, "GP", 36)
    assert sizes.text(4 * one + 1) == "4*T + 1"
    assert sizes.text(other // 2) == "(GP//2)"
    assert sizes.text(7) == "7"
    with mode:
        total = sizes.bytes_of([torch.empty(one, 2), torch.empty(one, 3), torch.empty(5, dtype=torch.int8)], unsized=1)
    assert (total.number, total.expression) == (34 * 20 + 5, "20*T + 5")
    assert str(total) == "20*T + 5 (685 as traced) + 1 of unknown shape"
