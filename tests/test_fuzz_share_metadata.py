"""`share_metadata` on random FX graphs: nothing but where things are computed may change.

Checked: outputs, inputs and attributes after the run, the log of effects and the state of the random generator are
equal bit for bit, strides included, on two sizes; what shares storage with what is as it was; one
prepare_metadata where anything depends on the layout alone, and nothing of that kind outside; a second application
changes nothing; equal graphs give equal text. `python tests/test_fuzz_share_metadata.py --graphs 50000` runs more.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fx_fuzz import FIRST_STATE, MOVABLE, ROOT, SIZES, Program, Step, build, minimal, random_program
from fx_fuzz_root import ATTRIBUTES, LOG, restore, state
from fx_fuzz_trace import TRACERS, MakeInputs, make_inputs
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from traces import text

from autodeploy.compiler import pipeline
from autodeploy.graph.edit import copy_module
from autodeploy.graph.meta import NEAR_MISS
from passes import ShareMetadata


@pytest.fixture(autouse=True)
def _leave_no_autocast() -> Iterator[None]:
    """A graph that fails between entering autocast and leaving it would leave it on for other tests."""
    yield
    torch.set_autocast_enabled("cpu", False)


@dataclass(frozen=True)
class Observation:
    """All that a caller of a graph can see of one run."""

    tensors: list[Tensor]  # outputs, inputs and attributes
    others: tuple[Any, ...]  # structure, numbers, log of effects, random state
    storages: list[int]  # for each tensor, the first that shares its storage


def observe(gm: fx.GraphModule, make: MakeInputs, size: int) -> Observation:
    restore(ROOT, FIRST_STATE)
    inputs = make(size)
    torch.default_generator.manual_seed(0)
    with torch.no_grad():
        outputs = gm.forward(*inputs)
    noise = torch.rand(4).tolist()
    leaves, structure = pytree.tree_flatten(outputs)
    values = [*leaves, *inputs]
    tensors = [value for value in [*values, *state(ROOT).values()] if isinstance(value, Tensor)]
    numbers = [repr(value) for value in values if not isinstance(value, Tensor)]
    ids = [tensor.untyped_storage()._cdata for tensor in tensors]
    kept = [tensor.clone() for tensor in tensors]
    strides = [tensor.stride() for tensor in tensors]
    return Observation(kept, (structure, numbers, repr(LOG), noise, strides), [ids.index(each) for each in ids])


class Wrong(AssertionError):
    """Something changed that may not. The message begins with the kind of failure, up to a colon."""


def compare(want: Observation, got: Observation) -> None:
    """Raises Wrong where `got` differs in any way from `want`."""
    if got.others != want.others:
        raise Wrong(f"structure, numbers, effects, noise or strides: {want.others} became {got.others}")
    for one, other in zip(want.tensors, got.tensors, strict=True):
        if one.dtype != other.dtype or one.shape != other.shape or _bits(one) != _bits(other):
            raise Wrong(f"values: {one} became {other}")
    if got.storages != want.storages:
        raise Wrong(f"sharing of storage: {want.storages} became {got.storages}")


def _bits(tensor: Tensor) -> bytes:
    return (tensor.double() if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()


def check(program: Program) -> pipeline.PassRecord:
    """Build, share, and compare all that can be seen."""
    gm = build(program)
    return check_module(gm, make_inputs(gm))


def check_module(gm: fx.GraphModule, make: MakeInputs) -> pipeline.PassRecord:
    sizes = {size: want for size in (SIZES[1], 1) if (want := _observe_or_none(gm, make, size)) is not None}
    gm, twin = copy_module(gm), copy_module(gm)
    (record,) = pipeline.run(gm, [ShareMetadata()])
    gm.graph.lint()
    for size, want in sizes.items():
        compare(want, observe(gm, make, size))
    done = text(gm)
    if left := _left_without_reason(gm) & gm.meta.get(MOVABLE, set()):
        raise Wrong(f"left outside: {sorted(left)} of\n{done}")
    if (again := ShareMetadata().apply(gm)) != 0 or text(gm) != done:
        raise Wrong(f"a second application: {again} matches,\n{done}\nbecame\n{text(gm)}")
    pipeline.run(twin, [ShareMetadata()])
    if text(twin) != done:
        raise Wrong(f"an equal graph: {text(twin)}")
    return record


def _left_without_reason(gm: fx.GraphModule) -> set[str]:
    """Names of the calls outside prepare_metadata that read nothing which the pass said why it left."""
    refused: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if NEAR_MISS.on(node) or not refused.isdisjoint(node.all_input_nodes):
            refused.add(node)
    return {node.name for node in gm.graph.nodes if node.op[:4] == "call" and node not in refused}


def _observe_or_none(gm: fx.GraphModule, make: MakeInputs, size: int) -> Observation | None:
    """None where the graph itself cannot run on that size."""
    try:
        return observe(gm, make, size)
    except Exception:
        return None


def failure(program: Program) -> str | None:
    """The kind of failure, None where all is well."""
    try:
        check(program)
    except Exception as error:
        return f"{type(error).__name__} {str(error).split(':')[0][:60]}"
    return None


def report(program: Program) -> str:
    """A failing program made small, its graph, and what went wrong."""
    kind = failure(program)
    small = minimal(program, lambda each: failure(each) == kind)
    gm = build(small)
    try:
        check_module(gm, make_inputs(gm))
    except Exception as error:
        return f"{small}\n{gm.graph}\n{type(error).__name__}: {error}"
    return f"fails only at times: {kind}\n{program}"


_RUNNING_MEAN = ATTRIBUTES.index("norm.running_mean")
# What random graphs once got wrong, made small.
FOUND = {
    "an embedding that scales its table": Program(
        ("x", "positions"), (Step("sub", 0, 1, 0), Step("embedding with max_norm", 1, 1, 0)), 3
    ),
    "running statistics, read later": Program(
        ("positions", "x"),
        (Step("batch_norm in training", 1, 0, 0), Step("get_attr", 0, 0, _RUNNING_MEAN), Step("add", 0, 3, 0)),
        3,
    ),
    "the second argument of several, written to": Program(
        ("positions", "layout"), (Step("add_ to the second of two", 0, 1, 0), Step("clone", 1, 0, 0)), 3
    ),
    "an index by a list and by a tuple": Program(
        ("layout",), (Step("x[...]", 0, 0, 8), Step("x[...]", 0, 0, 9), Step("sum", 1, 0, 0), Step("sum", 2, 0, 0)), 3
    ),
    "a constant that is returned, and its equal": Program(
        ("positions",), (Step("get_attr", 0, 0, 0), Step("add", 0, 1, 0), Step("get_attr", 0, 0, 1)), 3
    ),
    "a constant and its view, both returned": Program(
        (), (Step("full_like", 0, 0, 1), Step("slice to a size", 0, 0, 1), Step("clone", 0, 0, 0)), 3
    ),
    "constants that are views, returned": Program(
        (), (Step("shape[0]", 0, 0, 1), Step("slice to a size", 0, 0, 0), Step("view method", 0, 0, 1)), 3
    ),
    "a constant read on both sides": Program(
        ("table", "positions"),
        (
            Step("F.softmax", 0, 0, 1),
            Step("F.softmax", 0, 0, 1),
            Step("cumsum", 3, 0, 0),
            Step("x > y", 3, 1, 0),
        ),
        3,
    ),
    "the layout, read back": Program(("layout",), (Step("tolist", 0, 0, 0), Step("clone", 0, 0, 0)), 3),
    "the largest of each column": Program(
        ("positions", "table"), (Step("method max", 1, 0, 0), Step("where", 0, 2, 1)), 3
    ),
    "a value of the layout, written to": Program(
        ("layout",), (Step("-x", 0, 0, 0), Step("add_", 1, 0, 0), Step("clone", 0, 0, 0)), 3
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_by_random_graphs(name: str) -> None:
    check(FOUND[name])


NUM_BATCHES, BATCH, NUM_TRACED = 30, 100, 12


@pytest.mark.parametrize("seed", range(NUM_BATCHES))
def test_random_graphs(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(BATCH):
        program = random_program(rng)
        if failure(program):
            pytest.fail(report(program))


@pytest.mark.parametrize("tracer", TRACERS)
def test_traced_random_graphs(tracer: str) -> None:
    """The same programs with symbolic shapes recorded; what a tracer refuses is left out, and most must be traced."""
    rng = random.Random(0)
    programs = [random_program(rng) for _ in range(NUM_TRACED)]
    records = [check_traced(program, tracer) for program in programs]
    assert sum(record is not None for record in records) > NUM_TRACED // 2
    assert sum(record is not None and record.matches > 0 for record in records) > NUM_TRACED // 4


def check_traced(program: Program, tracer: str) -> pipeline.PassRecord | None:
    gm = build(program)
    restore(ROOT, FIRST_STATE)
    try:
        traced, make = TRACERS[tracer](gm, SIZES[0])
    except Exception:
        return None
    return check_module(traced, make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=2, help="so many failures of a kind")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    rng, start = random.Random(options.seed), time.time()
    for index in range(options.graphs):
        program = random_program(rng)
        try:
            record = check(program)
        except Exception:
            kind = failure(program)
            counts[f"failed: {kind}"] += 1
            if counts[f"failed: {kind}"] <= options.show:
                print(f"--- graph {index}\n{report(program)}\n", flush=True)
            continue
        counts["moved"] += record.matches > 0
        counts["merged"] += record.after.metadata_nodes < record.before.metadata_nodes
        counts["refused"] += bool(record.near_misses)
        if index % 1000 == 999:
            print(f"{index + 1} graphs, {time.time() - start:.0f} s, {dict(counts)}", flush=True)
    sys.exit(any(key.startswith("failed") for key in counts))


if __name__ == "__main__":
    main()
