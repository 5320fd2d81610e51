"""Pairs of graphs whose matching nodes are known, and how well the matcher finds them without being told.

    python tests/match_truth.py

The truth of passes is their recorded history, that of the other pairs follows from how they were built.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tiny_models import tiny
from torch import Tensor, nn
from traces import traced

from autodeploy.compiler import pipeline
from autodeploy.viz.infer import infer_fates
from autodeploy.viz.match import match
from autodeploy.viz.provenance import Recorder
from autodeploy.viz.snapshot import Snapshot
from passes import default

Pairs = set[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """Two graphs and the pairs, and where known the mergers, that are right."""

    before: Snapshot
    after: Snapshot
    pairs: Pairs
    merged: Pairs | None = None


@dataclass(frozen=True)
class Score:
    """Counts of pairs: right, wrong, and missed; and of mergers, where the truth says which there are."""

    right: int
    wrong: int
    missed: int
    merged_right: int
    merged: int
    seconds: float
    stages: dict[str, int]

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.wrong)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.right + self.missed)


def score(case: Case) -> Score:
    """How the matcher does on `case`; ids are shuffled away, so that it cannot profit from equal ones."""
    before = _renumbered(case.before, 1_000_000)
    start = time.perf_counter()
    links = match(before, case.after)
    infer_fates(before, case.after, links)
    seconds = time.perf_counter() - start
    found = {(one - 1_000_000, other) for one, other in links.pairs.items()}
    merged = {(one - 1_000_000, other) for one, other in links.merged.items()}
    truth = case.merged or set()
    right = len(found & case.pairs)
    return Score(
        right,
        len(found) - right,
        len(case.pairs) - right,
        len(merged & truth),
        len(truth),
        seconds,
        dict(Counter(links.stages.values())),
    )


def _renumbered(snapshot: Snapshot, offset: int) -> Snapshot:
    data = snapshot.to_json()
    for node in data["nodes"]:
        node["id"] += offset
        node["arguments"] = _shifted(node.get("arguments", []), offset)
    return Snapshot.from_json(data)


def _shifted(data: object, offset: int) -> object:
    if isinstance(data, list):
        return [_shifted(item, offset) for item in data]
    if isinstance(data, dict):
        return {key: item + offset if key == "node" else _shifted(item, offset) for key, item in data.items()}
    return data


def of_pass(model_type: str, name: str) -> Case:
    """The graph before and after one pass of the default pipeline."""
    gm, steps = traced(model_type), default()
    index = [step.name for step in steps].index(name)
    with Recorder() as recorder:
        pipeline.run(gm, steps[: index + 1], [recorder])
    return _recorded(recorder, index)


def of_pipeline(model_type: str) -> Case:
    """The graph before and after all passes."""
    with Recorder() as recorder:
        pipeline.run(traced(model_type), default(), [recorder])
    return _recorded(recorder, 0)


def _recorded(recorder: Recorder, first: int) -> Case:
    trace = recorder.trace()
    last = len(trace.stages) - 1
    links = trace.links(first, last)
    stages = trace.stages
    return Case(stages[first].snapshot, stages[last].snapshot, set(links.pairs.items()), set(links.merged.items()))


class Block(nn.Module):
    """A residual block; what it computes before its first weight is the same in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + torch.relu(self.down(nn.functional.gelu(self.up(self.norm(y)))))


class Stack(nn.Module):
    """Equal blocks that run in the order given."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x)
        return x.sum(-1)


def export(module: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), (torch.ones(2, 3, 8),))


def swapped() -> Case:
    """The same model with two of its equal layers in the other order."""
    return _by_place(Stack(0, 1, 2, 3), Stack(0, 2, 1, 3))


def dropped() -> Case:
    """The same model without one of its layers."""
    return _by_place(Stack(0, 1, 2, 3), Stack(0, 1, 3))


def _by_place(one: nn.Module, other: nn.Module) -> Case:
    before, after = (Snapshot.of(export(module).module(check_guards=False)) for module in (one, other))
    places = [_places(snapshot) for snapshot in (before, after)]
    return Case(before, after, {(places[0][place], places[1][place]) for place in places[0].keys() & places[1].keys()})


def _places(snapshot: Snapshot) -> dict[tuple[str, str, int], int]:
    """Each node's module, target and how many like it came before: what a reader of the source would say it is."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for node in snapshot.nodes:
        kind = (node.module, node.target)
        found[(*kind, seen[kind])] = node.id
        seen[kind] += 1
    return found


def decomposed() -> Case:
    """Before and after torch's decompositions; they note where each node comes from."""
    program = export(Stack(0, 1, 2, 3))
    gms = [ep.module(check_guards=False) for ep in (program, program.run_decompositions())]
    before, after = map(Snapshot.of, gms)
    old = {node.name: node for node in before.nodes}
    sources = {node.name: node.meta.get("from_node") for node in gms[1].graph.nodes}
    pairs = set()
    for node in after.nodes:
        source = sources[node.name][0].name if node.op == "call_function" else node.name
        twin = old.get(source)
        if twin is not None and twin.target == node.target:
            pairs.add((twin.id, node.id))
    return Case(before, after, pairs)


class Wrapped(nn.Module):
    """Something else around a model, so that every module path differs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def wrapped() -> Case:
    """The same model traced twice, once inside another module."""
    before, after = (
        Snapshot.of(export(module).module(check_guards=False))
        for module in (Stack(0, 1, 2, 3), Wrapped(Stack(0, 1, 2, 3)))
    )
    return Case(before, after, {(one.id, other.id) for one, other in zip(before.nodes, after.nodes, strict=True)})


def retraced(model_type: str) -> Case:
    """The same model traced twice, with other names of nodes and symbols the second time."""
    from autodeploy.trace import trace

    before = Snapshot.of(traced(model_type))
    after = Snapshot.of(trace(tiny(model_type)))
    nodes = [
        dataclasses.replace(node, name=f"{node.name}_{index}" if node.op == "call_function" else node.name)
        for index, node in enumerate(after.nodes)
    ]
    pairs = {(one.id, other.id) for one, other in zip(before.nodes, nodes, strict=True)}
    return Case(before, Snapshot(tuple(nodes)), pairs)


CASES: dict[str, Callable[[], Case]] = {
    "canonicalize, llama": partial(of_pass, "llama", "canonicalize"),
    "nest_inputs, qwen3": partial(of_pass, "qwen3", "nest_inputs"),
    "insert_cached_attention, gemma3 (two layer types)": partial(of_pass, "gemma3_text", "insert_cached_attention"),
    "share_metadata, gpt_oss (experts, two layer types)": partial(of_pass, "gpt_oss", "share_metadata"),
    "lower_fields, lfm2 (convolution and attention)": partial(of_pass, "lfm2", "lower_fields"),
    "lower_linear, gpt2": partial(of_pass, "gpt2", "lower_linear"),
    "all passes, llama": partial(of_pipeline, "llama"),
    "all passes, mixtral (experts)": partial(of_pipeline, "mixtral"),
    "all passes, lfm2 (convolution and attention)": partial(of_pipeline, "lfm2"),
    "two equal layers swapped": swapped,
    "one of four equal layers dropped": dropped,
    "decompositions": decomposed,
    "traced twice, gemma3": partial(retraced, "gemma3_text"),
    "inside another module": wrapped,
}


def main() -> None:
    print(f"{'pair':52} {'nodes':>5} {'precision':>9} {'recall':>7} {'merged':>7} {'ms':>5}  stages")
    for name, make in CASES.items():
        case = make()
        found = score(case)
        merged = f"{found.merged_right}/{found.merged}" if found.merged else "-"
        figures = f"{found.precision:9.4f} {found.recall:7.4f} {merged:>7} {found.seconds * 1e3:5.0f}"
        print(f"{name:52} {len(case.before.nodes):5} {figures}  {found.stages}")


if __name__ == "__main__":
    main()
