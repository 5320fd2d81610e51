"""The history of a graph through a pipeline: the graph after each pass, and what became of every node."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from autodeploy.errors import UnknownName
from autodeploy.viz.classify import classify
from autodeploy.viz.difference import Difference
from autodeploy.viz.links import Links
from autodeploy.viz.node import Node, check_types, node_from_json, node_to_json
from autodeploy.viz.snapshot import Snapshot, checked, distinct

SCHEMA = "autodeploy.trace/1"


@dataclass(frozen=True)
class Stage:
    """The graph after one pass; a node has the same id in every stage.

    `into` gives for nodes that the pass dropped the ids that their users read instead, and `origins` for new nodes the
    ids that they were copied from. `error` says why the pass did not finish; the snapshot is then what it left behind.
    """

    name: str
    snapshot: Snapshot
    options: str = ""
    matches: int = 0
    seconds: float = 0.0
    error: str = ""
    into: dict[int, tuple[int, ...]] = field(default_factory=dict)
    origins: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class History:
    """Stages in order; the first is the graph before any pass."""

    stages: tuple[Stage, ...]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' -> '.join(stage.name for stage in self.stages)})"

    def index(self, stage: int | str) -> int:
        """The number of a stage, counted from the end where it is negative. Raises UnknownName for an unknown name."""
        names = [stage.name for stage in self.stages]
        if isinstance(stage, str) and stage not in names:
            raise UnknownName("stage", stage, names)
        return names.index(stage) if isinstance(stage, str) else range(len(names))[stage]

    def between(self, first: int, last: int, ignore: Iterable[str] = ()) -> Difference:
        """What the passes after stage `first` did up to stage `last`, by exact links."""
        before, after = self.stages[first].snapshot, self.stages[last].snapshot
        return Difference(before, after, classify(before, after, self.links(first, last), ignore))

    def links(self, first: int, last: int) -> Links:
        """The links of all passes between two stages as one."""
        links = Links()
        after = self.stages[last].snapshot.by_id
        for id in self.stages[first].snapshot.by_id:
            if id in after:
                links.pair(id, id, "provenance")
                continue
            ends, merged = self._follow(id, first, last)
            ends = tuple(end for end in ends if end in after)
            if merged and len(ends) == 1:
                links.merged[id] = ends[0]
            elif ends:
                links.into[id] = ends
        return links

    def _follow(self, id: int, first: int, last: int) -> tuple[tuple[int, ...], bool]:
        """What stands for node `id` of stage `first` in stage `last`, and whether it only ever was a duplicate."""
        current, merged = {id: None}, True
        for before, stage in zip(self.stages[first:last], self.stages[first + 1 : last + 1], strict=True):
            following: dict[int, None] = {}
            for old in current:
                if old in stage.snapshot.by_id:
                    following[old] = None
                    continue
                new = stage.into.get(old, ())
                merged &= len(new) == 1 and _is_duplicate(before.snapshot, old, new[0])
                following |= dict.fromkeys(new)
            current = following
        return tuple(current), merged

    def made_by(self, id: int) -> str:
        """The stage that a node first appears in."""
        return next(stage.name for stage in self.stages if id in stage.snapshot.by_id)

    def origins(self, id: int) -> tuple[int, ...]:
        """The nodes that it was copied from or stands for."""
        for stage in self.stages:
            if id in stage.snapshot.by_id:
                replaced = (old for old, new in stage.into.items() if id in new)
                return tuple(dict.fromkeys([*stage.origins.get(id, ()), *replaced]))
        return ()

    def to_json(self) -> dict[str, Any]:
        """Plain data with a versioned schema. A node that a pass left as it was is written once for all stages."""
        pool: dict[str, int] = {}
        stages = [_stage_to_json(stage, pool) for stage in self.stages]
        return {"schema": SCHEMA, "nodes": [json.loads(node) for node in pool], "stages": stages}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` wrote. Raises OptionError for anything else."""
        with checked(data, SCHEMA):
            if not data["stages"]:
                raise ValueError("no stages")
            pool = dict(enumerate(node_from_json(node) for node in data["nodes"]))
            return cls(tuple(_stage_from_json(stage, pool) for stage in data["stages"]))


_TYPES: dict[str, type] = {"name": str, "options": str, "nodes": list, "into": list, "origins": list}


def _is_duplicate(before: Snapshot, old: int, new: int) -> bool:
    """Whether `new` was there already and does the same to its arguments."""
    one, other = before.by_id[old], before.by_id.get(new)
    return other is not None and one.label == other.label


def _stage_to_json(stage: Stage, pool: dict[str, int]) -> dict[str, Any]:
    # Pooled by text, because nodes that differ in 1 and 1.0 are equal in Python.
    texts = (json.dumps(node_to_json(node)) for node in stage.snapshot.nodes)
    return {
        "name": stage.name,
        "options": stage.options,
        "matches": stage.matches,
        "seconds": stage.seconds,
        "error": stage.error,
        "nodes": [pool.setdefault(text, len(pool)) for text in texts],
        "into": [[old, list(new)] for old, new in sorted(stage.into.items())],
        "origins": [[new, list(old)] for new, old in sorted(stage.origins.items())],
    }


def _stage_from_json(data: dict[str, Any], pool: dict[int, Node]) -> Stage:
    check_types({key: data[key] for key in _TYPES}, _TYPES, required=())
    return Stage(
        data["name"],
        Snapshot(distinct(pool[index] for index in data["nodes"]), data["name"]),
        data["options"],
        data["matches"],
        data["seconds"],
        data["error"],
        {int(old): tuple(map(int, new)) for old, new in data["into"]},
        {int(new): tuple(map(int, old)) for new, old in data["origins"]},
    )
