"""The runner: applies passes in order, checks after each, records what each did. It knows no pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import fx

from autodeploy import spec
from autodeploy.errors import AutodeployError, PassError, node_location
from autodeploy.graph import PREPARE, metadata_nodes, prepare_nodes, take_near_misses
from autodeploy.metadata import fields


@runtime_checkable
class Pass(Protocol):
    """One rewrite: a frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str: ...

    def apply(self, gm: fx.GraphModule) -> int:
        """Rewrite `gm` in place and return the number of matches; 0 means that nothing changed."""
        ...


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
class PassRecord:
    """What one pass did.

    `metadata_nodes` counts the layout-only tensor nodes after it, inside prepare_metadata or not, and `metadata_ops`
    the torch ops they come to once fields are written out as their formulas.
    """

    name: str
    options: str
    matches: int
    near_misses: tuple[NearMiss, ...]
    nodes_before: int
    nodes_after: int
    metadata_nodes: int
    metadata_ops: int
    prepare_calls: int
    seconds: float


def run(gm: fx.GraphModule, passes: Sequence[Pass], observers: Iterable[Observer] = ()) -> list[PassRecord]:
    """Apply `passes` to `gm` in place, in order.

    After each: dead code is dropped, the module recompiled, and the invariants of `autodeploy.spec` checked.
    Raises PassError (or the pass's own typed error) naming the pass that failed.
    """
    observers = list(observers)
    records = []
    for step in passes:
        for observer in observers:
            observer.before(step, gm)
        record = _apply(gm, step)
        records.append(record)
        for observer in observers:
            observer.after(step, gm, record)
    return records


def _apply(gm: fx.GraphModule, step: Pass) -> PassRecord:
    take_near_misses(gm)
    nodes_before = count_nodes(gm)
    start = time.perf_counter()
    try:
        matches = step.apply(gm)
        if matches:
            gm.graph.eliminate_dead_code()
            gm.recompile()
        spec.check(gm)
    except AutodeployError as error:
        error.add_note(f"  pass:  {step.name}")
        raise
    except Exception as error:
        raise PassError(f"pass {step.name!r} failed: {type(error).__name__}: {error}", where=repr(step)) from error
    seconds = time.perf_counter() - start
    misses = tuple(NearMiss(node_location(node), reason) for node, reason in take_near_misses(gm))
    metadata = _metadata(gm)
    return PassRecord(
        name=step.name,
        options=repr(step),
        matches=matches,
        near_misses=misses,
        nodes_before=nodes_before,
        nodes_after=count_nodes(gm),
        metadata_nodes=len(metadata),
        metadata_ops=sum(fields.num_ops(node.target) for node in metadata),
        prepare_calls=len(prepare_nodes(gm)),
        seconds=seconds,
    )


def count_nodes(gm: fx.GraphModule) -> int:
    """Nodes of `gm` and of its prepare_metadata."""
    prepare = getattr(gm, PREPARE, None)
    return len(gm.graph.nodes) + (len(prepare.graph.nodes) if isinstance(prepare, fx.GraphModule) else 0)


def _metadata(gm: fx.GraphModule) -> list[fx.Node]:
    """Layout-only tensor nodes, wherever they stand."""
    prepare = getattr(gm, PREPARE, None)
    inside = metadata_nodes(prepare) if isinstance(prepare, fx.GraphModule) else []
    return inside + metadata_nodes(gm)
