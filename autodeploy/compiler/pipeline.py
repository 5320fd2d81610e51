"""The runner: applies passes in order, checks after each, records what each did. It knows no pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from autodeploy.compiler import spec
from autodeploy.errors import AutodeployError, InvariantError, PassError
from autodeploy.graph.dependence import Split, split
from autodeploy.graph.edit import PREPARE, Pass, prepare_nodes, take_near_misses
from autodeploy.graph.effects import is_needed
from autodeploy.graph.location import node_location
from autodeploy.graph.memory import written
from autodeploy.graph.sizes import NO_BYTES, Bytes, bytes_of
from autodeploy.graph.spelling import recorded_value
from autodeploy.metadata.field import num_ops
from autodeploy.viz.pause import collector_paused


class Observer(Protocol):
    """Sees each pass without changing anything: viewer, timing, verification."""

    def before(self, step: Pass, gm: fx.GraphModule) -> None: ...

    def after(self, step: Pass, gm: fx.GraphModule, record: PassRecord) -> None: ...


@dataclass(frozen=True)
class NearMiss:
    """A node that a pass looked at and left alone, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Counts:
    """A graph in numbers, prepare_metadata's own nodes included.

    `metadata_nodes` are the layout-only tensor nodes, `metadata_ops` the torch ops that they come to once fields are
    written out as their formulas, and `metadata_bytes` what they write, views left out.
    """

    nodes: int
    metadata_nodes: int
    metadata_ops: int
    prepare_calls: int
    metadata_bytes: Bytes = NO_BYTES


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, in how many seconds."""

    name: str
    options: str
    matches: int
    near_misses: tuple[NearMiss, ...]
    before: Counts
    after: Counts
    seconds: float


def run(gm: fx.GraphModule, passes: Sequence[Pass], observers: Iterable[Observer] = ()) -> list[PassRecord]:
    """Apply `passes` to `gm` in place, in order.

    Dead code is dropped before the first and after each; then the invariants of `autodeploy.compiler.spec` are checked.
    The module's code is generated once at the end, or after each pass where there are observers, who may run it.
    Raises PassError (or the pass's own typed error) naming the pass that failed.
    """
    observers = list(observers)
    records = []
    _drop_dead_code(gm)
    counts, typed = count(gm, split(gm)), spec.is_typed(gm)
    for step in passes:
        for observer in observers:
            observer.before(step, gm)
        # One full collection of torch's and transformers' heap takes 0.28 s, as long as all passes on SmolLM2.
        with collector_paused():
            record = _apply(gm, step, counts, typed)
        records.append(record)
        counts = record.after
        if observers:
            gm.recompile()
        for observer in observers:
            observer.after(step, gm, record)
    gm.recompile()
    return records


def _apply(gm: fx.GraphModule, step: Pass, before: Counts, typed: bool) -> PassRecord:
    take_near_misses(gm)
    start = time.perf_counter()
    try:
        matches = step.apply(gm)
        if not isinstance(matches, int):
            raise PassError(
                f"pass {step.name!r} returned {matches!r}", where=repr(step), fix="return how many it matched"
            )
        _check_users(gm)
        after = _tidy(gm, typed)
    except AutodeployError as error:
        error.add_note(f"  pass:  {step.name}")
        raise
    except Exception as error:
        raise PassError(f"pass {step.name!r} failed: {type(error).__name__}: {error}", where=repr(step)) from error
    seconds = time.perf_counter() - start
    misses = tuple(NearMiss(node_location(node), reason) for node, reason in take_near_misses(gm))
    return PassRecord(step.name, repr(step), matches, misses, before, after, seconds)


def _check_users(gm: fx.GraphModule) -> None:
    """What FX's own check leaves out: each node is known to those it reads, or dead code would be what is not."""
    for node in gm.graph.nodes:
        for arg in node._input_nodes:
            if node not in arg.users:
                raise InvariantError(f"{arg.name} does not know that {node.name} reads it", where=node_location(node))


def _tidy(gm: fx.GraphModule, typed: bool) -> Counts:
    """Drop dead code and check the invariants."""
    _drop_dead_code(gm)
    parts = split(gm)
    spec.check(gm, parts, typed=typed)
    return count(gm, parts)


def _drop_dead_code(gm: fx.GraphModule) -> None:
    try:
        gm.graph.eliminate_dead_code(is_needed)  # checks that the graph is well formed first
    except RuntimeError as error:
        raise InvariantError(f"the graph is not valid: {error}") from error


def count(gm: fx.GraphModule, parts: Split) -> Counts:
    """The numbers of `gm`, where `parts` is `dependence.split(gm)`."""
    calls = prepare_nodes(gm)
    inner = getattr(gm, PREPARE) if calls else None
    metadata = parts.metadata + (split(inner).metadata if inner else [])
    return Counts(
        nodes=len(gm.graph.nodes) + (len(inner.graph.nodes) if inner else 0),
        metadata_nodes=len(metadata),
        metadata_ops=sum(num_ops(node.target) for node in metadata),
        prepare_calls=len(calls),
        metadata_bytes=bytes_of(
            (tensor for node in metadata for tensor in written(node)),
            unsized=sum(recorded_value(node) is None for node in metadata),
        ),
    )
