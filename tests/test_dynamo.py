"""torch.compile(model, backend="autodeploy"): the same bits as Inductor, each mask, table and bias made once.

Inductor itself is deterministic on a CPU: two compilations of one model, without caches, differ by 0. So all
comparisons with it are for equal bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny, tokens
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from autodeploy.app.doctor import doctor_lines
from autodeploy.compiler.pipeline import Counts, NearMiss, PassRecord
from autodeploy.compiler.report import Ledger, Report
from autodeploy.errors import OptionError
from autodeploy.graph.edit import placeholders
from autodeploy.graph.meta import ROLE, VALUE
from autodeploy.inductor import torch_compile as dynamo

# Inductor's own imports use a deprecated part of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

HIDDEN = 16
NUM_LAYERS = 3
SHAPES = ((2, 9), (3, 17), (2, 5))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled before, and no code from a cache, so that the passes run."""
    torch._dynamo.reset()
    counters.clear()
    dynamo._reports.clear()
    with inductor_config.patch(fx_graph_cache=False):
        yield


class Layer(nn.Module):
    """Attention with its own scores, `bias(scores)` on top; weights that no two layers share."""

    def __init__(self, bias: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return x + self.bias(y @ y.transpose(1, 2)).softmax(-1) @ y


def causal_window(scores: Tensor) -> Tensor:
    """Each layer makes its own mask."""
    rows, columns = torch.arange(scores.shape[1])[:, None], torch.arange(scores.shape[2])[None, :]
    return scores.masked_fill((columns > rows) | (columns <= rows - 4), float("-inf"))


def alibi(scores: Tensor) -> Tensor:
    """Each layer makes its own bias, linear in the distance."""
    positions = torch.arange(scores.shape[1])
    return scores - 0.25 * (positions[:, None] - positions[None, :]).abs()


class Rope(nn.Module):
    """Each layer makes its own rotary table from a buffer they share."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(HIDDEN // 2) / HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.inv_freq
        table = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * table.cos() + torch.cat([-second, first], dim=-1) * table.sin()


def layers(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind != "rope":
        return nn.Sequential(*(Layer({"mask": causal_window, "alibi": alibi}[kind]) for _ in range(NUM_LAYERS))).eval()
    rope = Rope()
    return nn.Sequential(*(nn.Sequential(rope, nn.Linear(HIDDEN, HIDDEN)) for _ in range(NUM_LAYERS))).eval()


def inputs(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(length))


@dataclass
class CountOps(CustomGraphPass):
    """How many nodes of each op Inductor is left with, after all passes."""

    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, graph: fx.Graph) -> None:
        self.counts.update(str(node.target) for node in graph.nodes)

    def uuid(self) -> str:
        return "count ops"


@dataclass(frozen=True)
class Run:
    """One compilation: its outputs for `SHAPES`, the ops left, Dynamo's counters, our reports."""

    outputs: list[Tensor]
    ops: Counter[str]
    compilations: dict[str, dict[str, int]]
    reports: tuple[Report, ...]


def run(model: nn.Module, backend: str, **options: Any) -> Run:
    torch._dynamo.reset()
    counters.clear()
    dynamo._reports.clear()
    compiled = torch.compile(model, backend=backend, dynamic=True, **options)
    ops = CountOps()
    with torch.no_grad(), inductor_config.patch(post_grad_custom_post_pass=ops):
        results = [compiled(inputs(*shape)) for shape in SHAPES]
    kept = {name: dict(counters[name]) for name in ("frames", "stats", "recompiles", "graph_break")}
    return Run(results, ops.counts, kept, dynamo.reports())


@cache
def compiled(kind: str, backend: str) -> Run:
    return run(layers(kind), backend, fullgraph=True)


def assert_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_inductor_itself_is_deterministic() -> None:
    assert_equal(compiled("mask", "inductor").outputs, run(layers("mask"), "inductor", fullgraph=True).outputs)


@pytest.mark.parametrize("kind", ["mask", "alibi", "rope"])
def test_same_bits_as_inductor(kind: str) -> None:
    assert_equal(compiled(kind, "autodeploy").outputs, compiled(kind, "inductor").outputs)


@pytest.mark.parametrize(
    ("kind", "op"),
    [
        ("mask", "aten.gt.Tensor"),
        ("mask", "aten.le.Tensor"),
        ("alibi", "aten.abs.default"),
        ("rope", "aten.cos.default"),
    ],
)
def test_no_duplicates_are_left(kind: str, op: str) -> None:
    ours, theirs = compiled(kind, "autodeploy"), compiled(kind, "inductor")
    assert (ours.ops[op], theirs.ops[op]) == (1, NUM_LAYERS)
    assert ours.reports[0].ledger.nodes_shared < ours.reports[0].ledger.nodes_naive


@pytest.mark.parametrize("kind", ["mask", "alibi", "rope"])
def test_one_compilation_for_all_shapes(kind: str) -> None:
    ours, theirs = compiled(kind, "autodeploy"), compiled(kind, "inductor")
    assert ours.compilations == theirs.compilations
    assert (ours.compilations["stats"]["unique_graphs"], len(ours.reports)) == (1, 1)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "llama"])
def test_same_bits_as_inductor_on_models(model_type: str) -> None:
    model = tiny(model_type, 2)
    logits = []
    for backend in ("autodeploy", "inductor"):
        torch._dynamo.reset()
        with torch.no_grad():
            step = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
            logits.append(step(**tokens(2, 17), use_cache=False).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert len(dynamo.reports()) == 1


def test_inference_mode() -> None:
    model = layers("mask")
    with torch.inference_mode():
        result = torch.compile(model, backend="autodeploy", dynamic=True)(inputs())
    assert dynamo.last_report() == dynamo.reports()[0]
    assert_equal([result], compiled("mask", "inductor").outputs[:1])


def test_graph_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers("rope")

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers(x)
            torch._dynamo.graph_break()
            return self.layers(y)

    ours, theirs = run(Broken(), "autodeploy"), run(Broken(), "inductor")
    assert_equal(ours.outputs, theirs.outputs)
    assert ours.compilations == theirs.compilations
    assert [report.graph for report in ours.reports] == ["0/0", "1/0"]
    # Each graph has symbols of its own.
    ledgers = [report.ledger for report in ours.reports]
    assert len({(each.nodes_naive, each.nodes_shared, each.bytes_shared.number) for each in ledgers}) == 1


def test_sizes_known_only_at_run_time() -> None:
    def count(x: Tensor) -> Tensor:
        return (torch.arange(x.shape[0]) > 1).nonzero().sum() + 2 * (torch.arange(x.shape[0]) > 1).nonzero().sum()

    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        step = torch.compile(count, backend="autodeploy", dynamic=True, fullgraph=True)
        assert step(torch.ones(5)) == count(torch.ones(5))


def test_training_is_left_to_inductor() -> None:
    gradients = []
    for backend in ("autodeploy", "inductor"):
        model = layers("rope").train()
        torch.compile(model, backend=backend, dynamic=True)(inputs()).square().sum().backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
        torch._dynamo.reset()
    assert_equal(*gradients)
    assert [report.notes for report in dynamo.reports()] == [("no pass ran: a graph that trains is left to Inductor",)]


@dataclass(frozen=True)
class Clumsy:
    """Makes the graph wrong, then fails."""

    name: str = "clumsy"

    def apply(self, gm: fx.GraphModule) -> int:
        gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)[
            0
        ].target = torch.ops.aten.sin.default
        raise ZeroDivisionError("too clumsy")


def test_a_failing_pass_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "_passes", lambda: [Clumsy()])
    with pytest.raises(BackendCompilerFailed, match="pass 'clumsy' failed: ZeroDivisionError: too clumsy"):
        torch.compile(torch.cos, backend="autodeploy")(inputs())
    assert dynamo.reports() == ()


def test_falling_back_is_asked_for_and_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "_passes", lambda: [Clumsy()])
    step = torch.compile(torch.cos, backend="autodeploy", options={"on_error": "inductor"})
    with pytest.warns(UserWarning, match=r"graph 0/0 is compiled by Inductor alone: pass 'clumsy' failed"):
        result = step(inputs())
    assert_equal([result], [torch.compile(torch.cos, backend="inductor")(inputs())])
    assert "clumsy" in str(dynamo.last_report())


def test_falling_back_is_not_cached() -> None:
    # Else the next process would have code without the pass, and no warning.
    assert dynamo._SharedMetadata("0/0", dynamo._Inputs(()), set(), keeps_going=True).uuid() is None


@dataclass(frozen=True)
class Broken:
    """What looks like a pass and has no name."""

    def apply(self, gm: fx.GraphModule) -> int:
        return 0


def test_errors_of_no_pass_are_fallen_back_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "_passes", lambda: [Broken()])
    with pytest.raises(BackendCompilerFailed, match="PassError: AttributeError"):
        torch.compile(torch.cos, backend="autodeploy")(inputs())
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="compiled by Inductor alone: AttributeError"):
        torch.compile(torch.cos, backend="autodeploy", options={"on_error": "inductor"})(inputs())


def test_a_script_s_own_passes_are_not_mistaken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "passes.py").write_text("raise SystemExit('ran')")
    script = "import torch; torch.compile(torch.cos, backend='autodeploy')(torch.ones(3))"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "another module named 'passes' hides the passes of autodeploy" in result.stderr
    assert str(tmp_path / "passes.py") in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_eror": "raise"}, "unknown option 'on_eror'\n  fix:   did you mean 'on_error'.*\\? [0-9]+ are known"),
        ({"on_error": "ignore"}, "on_error='ignore'\n  fix:   use one of raise, inductor"),
        ({"max_autotune": "yes"}, "OptionError: .*Unexpected type of attr max_autotune"),
        ({1: 2}, "OptionError: an option is called 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(torch.cos, backend="autodeploy", options=options)(inputs())


def test_a_mode_that_torch_does_not_know() -> None:
    with pytest.raises(BackendCompilerFailed, match="OptionError: mode='fast'"):
        torch.compile(torch.cos, backend="autodeploy", mode="fast")(inputs())


@dataclass
class Spy(CustomGraphPass):
    """A pass of the user's own: what it saw of Inductor's configuration."""

    seen: list[tuple[bool, bool]] = field(default_factory=list)

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append((inductor_config.max_autotune, inductor_config.epilogue_fusion))

    def uuid(self) -> str:
        return "spy"


@pytest.mark.skipif(not dynamo._TAKES_MANY, reason="this version of torch takes one pass, ours")
def test_inductor_has_its_mode_and_options_and_the_users_passes() -> None:
    spy = Spy()
    torch.compile(torch.cos, backend="autodeploy", options={"post_grad_custom_pre_pass": spy})(inputs())
    with inductor_config.patch(post_grad_custom_pre_pass=spy):
        for arguments in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue-fusion": False}}):
            torch._dynamo.reset()
            torch.compile(torch.cos, backend="autodeploy", **arguments)(inputs())
    assert spy.seen == [(False, True), (True, True), (False, False)]
    assert all(report.passes for report in dynamo.reports())
    assert len(dynamo.reports()) == 3


@dataclass(frozen=True)
class ReadRoles:
    """Notes the role of each input of the ATen graph, by number of its dimensions."""

    roles: dict[int, str]
    name: str = "read_roles"

    def apply(self, gm: fx.GraphModule) -> int:
        for node in placeholders(gm):
            value = VALUE.of(node)
            self.roles[value.ndim if isinstance(value, Tensor) else -1] = ROLE.of(node)
        return 0


def test_roles_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("table", torch.ones(1, 3))
            self.epsilon = 0.5

        def forward(self, x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
            return (x * self.weight + self.table + self.epsilon + lengths).masked_fill(mask, 0)

    model, roles = Model(), {}
    monkeypatch.setattr(dynamo, "_passes", lambda: [ReadRoles(roles)])
    step = torch.compile(model, backend="autodeploy", dynamic=True)
    with torch.no_grad():
        for model.epsilon in (0.5, 0.25):  # a float that changes becomes an input
            step(torch.ones(4, 1, 3), torch.ones(5, 4, 1, 3, dtype=torch.int32), torch.ones(2, 5, 4, 1, 3).bool())
    assert roles == {-1: "layout", 0: "constant", 1: "weight", 2: "constant", 3: "tokens", 4: "layout", 5: "layout"}


CLEAN_PROCESS = textwrap.dedent(
    """
    import json, sys, torch
    from torch._dynamo.utils import counters

    def masked(x):
        for _ in range(3):
            positions = torch.arange(x.shape[0])
            x = x.where(positions[:, None] >= positions, 0) @ x
        return x

    assert not any(name.partition(".")[0] in ("autodeploy", "passes") for name in sys.modules)
    assert "autodeploy" in torch.compiler.list_backends()
    x = torch.eye(8)
    hits = []
    for backend in ("autodeploy", "inductor"):
        counters.clear()
        torch._dynamo.reset()
        with torch.no_grad():
            assert torch.equal(torch.compile(masked, backend=backend)(x), masked(x))
        hits.append([counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss")])
    assert "transformers" not in sys.modules  # it takes longer to import than all of ours
    from autodeploy.inductor import torch_compile as dynamo
    print(json.dumps([hits, str(dynamo.last_report())]))
    """
)


def clean_process(cache: Path) -> tuple[list[list[int]], str]:
    """Cache [hits, misses] of both backends in a process of its own, and our report."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", CLEAN_PROCESS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    hits, report = json.loads(result.stdout)
    return hits, report


def test_a_process_that_imports_nothing_of_ours(tmp_path: Path) -> None:
    """The second process has all code from the cache, and each backend its own."""
    hits, report = clean_process(tmp_path)
    assert hits == [[0, 1], [0, 1]]
    assert "share_metadata" in report
    hits, report = clean_process(tmp_path)
    assert hits == [[1, 0], [1, 0]]
    assert report.endswith("no pass ran: the code came from Inductor's cache")


def test_doctor_finds_the_entry_point() -> None:
    assert any('backend="autodeploy" is registered' in line for line in doctor_lines())


def test_refusals_are_grouped_by_reason() -> None:
    misses = tuple(NearMiss(f"node {name}", "draws random numbers") for name in ("rand", "rand_1", "rand_2"))
    counts = Counts(1, 0, 0, 0)
    record = PassRecord("share_metadata", "", 0, (*misses, NearMiss("node view", "is odd")), counts, counts, 0.0)
    lines = str(Report((record,), Ledger(0, 0, 0, 0, 0, 0), graph="0/0")).splitlines()
    assert "  near miss in share_metadata: 3 x draws random numbers (node rand)" in lines
    assert "  near miss in share_metadata: is odd (node view)" in lines


def test_reports_in_words_and_json() -> None:
    report = compiled("mask", "autodeploy").reports[0]
    assert str(report).startswith("torch.compile graph 0/0\npass ")
    assert str(report).splitlines()[-1].startswith("layout-only nodes: ")
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_recording_keeps_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an option, and by the environment with a folder; modules and inputs are called what the model calls them."""
    model = layers("mask")
    with torch.no_grad():
        expected = torch.compile(model, backend="inductor", dynamic=True)(inputs())
        torch._dynamo.reset()
        step = torch.compile(model, backend="autodeploy", dynamic=True, options={"record": True})
        assert_equal([step(inputs())], [expected])
    report = dynamo.last_report()
    assert report is not None
    assert report.trace is not None
    assert [stage.name for stage in report.trace.stages] == ["start", "share_metadata"]
    nodes = report.trace.stages[0].snapshot.nodes
    modules = {name for name, _ in model.named_modules()}
    assert {node.module for node in nodes} <= modules
    assert {name for name, _ in model.named_parameters()} <= {node.target for node in nodes if node.op == "placeholder"}
    assert report == Report.from_json(report.to_json())
    report.save(tmp_path / "step.html")
    assert "share_metadata" in report.trace.__repr__()

    monkeypatch.setenv("AUTODEPLOY_RECORD", str(tmp_path / "pages"))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="autodeploy", dynamic=True)(inputs())
    (page,) = (tmp_path / "pages").iterdir()
    assert page.read_text().startswith("<!doctype html>")


def test_a_report_without_record_says_how_to_get_one(tmp_path: Path) -> None:
    report = Report.without_passes("0/0", "nothing")
    with pytest.raises(OptionError, match="nothing was recorded") as caught:
        report.save(tmp_path / "x.html")
    assert "'record': True" in str(caught.value)
    report.save(tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text() == f"{report}\n"
