"""What a page shows, as plain data: a pool of node versions, the graphs they make up, and each step between two graphs.

Node ids are those of a trace. Of a difference, a pair has the id that it has in `after`, and the rest of `before` new
ones. A *place* is a node in one module: a node that moves to another graph or module has two. Each step has a tree of
its own: what it merged or moved away lies together, by the layers that it served.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from autodeploy.viz.arguments import Argument, format_argument
from autodeploy.viz.classify import PAIRED
from autodeploy.viz.difference import Difference
from autodeploy.viz.fold import GLYPHS, Block, split_layer
from autodeploy.viz.history import History, Stage
from autodeploy.viz.node import Node
from autodeploy.viz.snapshot import Snapshot
from autodeploy.viz.text import headline, which
from autodeploy.viz.tree import Group, build_tree, split_path
from autodeploy.viz.values import sum_bytes

SCHEMA = "autodeploy.page/2"
INPUTS = "inputs"  # the group of the outermost graph's placeholders
WAS = "before, layer by layer"  # that of what a step merged or moved into another graph
_SEVERAL = "read by several layers"
_FAR = 64  # nodes between a value and the layers that it serves
_FLAT = 60  # a called graph of so many nodes is one frame, without its modules

Place = tuple[int, tuple[str, ...]]
_MARK = re.compile("\0(-?\\d+)\0")


@dataclass(frozen=True, eq=False)
class _Moment:
    """One graph, and the page's id of each of its nodes."""

    stage: Stage
    ids: dict[int, int]

    @cached_property
    def node_of(self) -> dict[Place, Node]:
        """The node at each place."""
        return dict(self.places())

    def places(self) -> Iterator[tuple[Place, Node]]:
        """Every node with its place, in order."""
        for node in self.stage.snapshot.nodes:
            yield (self.ids[node.id], _home(node)), node


@dataclass(frozen=True, eq=False)
class _Step:
    """From moment `first` to moment `last`."""

    first: _Moment
    last: _Moment
    diff: Difference

    def kinds(self) -> dict[int, str]:
        """What happened to the node of each id, where it did not stay as it was."""
        found: dict[int, str] = {}
        for entry in self.diff.changed:
            after = () if entry.kind == "merged" else entry.after
            ids = [self.first.ids[id] for id in entry.before] + [self.last.ids[id] for id in after]
            found |= dict.fromkeys(ids, entry.kind)
        return found


def page_data(shown: History | Difference) -> dict[str, Any]:
    """The data of a page, ready for JSON."""
    moments = _moments(shown)
    steps = _steps(shown, moments)
    order = _in_order(moments)
    number = {place: index for index, place in enumerate(order)}
    pool: dict[str, int] = {}
    graphs = [_graph_data(moment, number, pool) for moment in moments]
    return {
        "schema": SCHEMA,
        "isHistory": isinstance(shown, History),
        "glyphs": GLYPHS,
        "stages": graphs,
        "versions": [json.loads(text) for text in pool],
        "places": [id for id, _ in order],
        "births": _births(moments),
        "steps": [_step_data(step, moments, order, number) for step in steps],
    }


def _moments(shown: History | Difference) -> list[_Moment]:
    if isinstance(shown, History):
        return [_Moment(stage, {id: id for id in stage.snapshot.by_id}) for stage in shown.stages]
    new = max((node.id for node in shown.after.nodes), default=0) + 1
    ids = {node.id: new + index for index, node in enumerate(shown.before.nodes)}
    for entry in shown.entries:
        if entry.kind in PAIRED:
            ids[entry.before[0]] = entry.after[0]
    sides = [Stage(side.title or name, side) for side, name in ((shown.before, "before"), (shown.after, "after"))]
    return [_Moment(sides[0], ids), _Moment(sides[1], {node.id: node.id for node in shown.after.nodes})]


def _steps(shown: History | Difference, moments: Sequence[_Moment]) -> list[_Step]:
    """All passes as one step, then each."""
    if isinstance(shown, Difference):
        return [_Step(moments[0], moments[1], shown)]
    last = len(moments) - 1
    pairs = [(index, index + 1) for index in range(last)]
    whole = [(0, last)] if last > 1 else []
    return [_Step(moments[one], moments[two], shown.between(one, two)) for one, two in whole + pairs]


def _home(node: Node) -> tuple[str, ...]:
    if node.op == "placeholder" and not node.graph:
        return (INPUTS,)
    return (*((node.graph,) if node.graph else ()), *split_path(node.module))


def _in_order(moments: Sequence[_Moment]) -> dict[Place, str]:
    """Every place with its first op; what is new in a graph comes after what precedes it there."""
    following: dict[Place | None, Place | None] = {None: None}
    ops: dict[Place, str] = {}
    for moment in moments:
        previous: Place | None = None
        for place, node in moment.places():
            if place not in ops:
                ops[place] = node.short_target
                following[place], following[previous] = following[previous], place
            previous = place
    return {place: ops[place] for place in _chain(following)}


def _chain(following: dict[Place | None, Place | None]) -> Iterator[Place]:
    place = following[None]
    while place is not None:
        yield place
        place = following[place]


def _tree(step: _Step, order: dict[Place, str], number: dict[Place, int]) -> Group:
    """The places that have a box in one step, by where they lie in it."""
    kinds = step.kinds()
    homes: dict[Place, tuple[str, ...]] = {}
    looks: dict[Place, Hashable] = {}
    for moment in (step.first, step.last):
        snapshot = moment.stage.snapshot
        flat = {path for path, size in Counter(node.graph for node in snapshot.nodes).items() if size <= _FLAT}
        for place, node in moment.places():
            if _has_box(snapshot, node, place[0] in kinds):
                home = place[1][:1] if node.graph and node.graph in flat else place[1]
                homes[place], looks[place] = home, (order[place], kinds.get(place[0]))
    for place in _gone(step):
        if place in homes:
            homes[place] = (WAS, _layer_served(step.first.stage.snapshot, step.first.node_of[place]))
            looks[place] = order[place]
    places = {number[place]: place for place in order if place in homes}
    return build_tree(
        {index: homes[place] for index, place in places.items()},
        {index: looks[place] for index, place in places.items()},
    )


def _has_box(snapshot: Snapshot, node: Node, is_changed: bool) -> bool:
    """All but what only hands a value on, the borders of called graphs, and attributes that nothing happens to."""
    is_border = (node.op == "output" and node.graph) or node.id in snapshot.callers
    return node.id not in snapshot.source_of and not is_border and (node.op != "get_attr" or is_changed)


def _gone(step: _Step) -> Iterator[Place]:
    """What was merged, or moved to another graph."""
    after = {step.last.ids[node.id]: node.graph for node in step.last.stage.snapshot.nodes}
    merged = {step.first.ids[id] for entry in step.diff.changed if entry.kind == "merged" for id in entry.before}
    for place, node in step.first.places():
        if place[0] in merged or after.get(place[0], node.graph) != node.graph:
            yield place


def _layer_served(snapshot: Snapshot, node: Node) -> str:
    """The layer that a node was made for, or whose nodes read it, through nodes that lie in no layer."""
    if layer := _layer(node):
        return layer
    found, pending, seen = set(), [node.id], {node.id}
    while pending and len(seen) < _FAR:
        for _, id in snapshot.users[pending.pop()]:
            layer = _layer(snapshot.by_id[id])
            found.add(layer)
            if not layer and id not in seen:
                seen.add(id)
                pending.append(id)
    found.discard("")
    return found.pop() if len(found) == 1 else _SEVERAL


def _layer(node: Node) -> str:
    layer, _ = split_layer(node.module)
    return layer if layer != node.module.partition(".")[0] else ""


def _graph_data(moment: _Moment, number: dict[Place, int], pool: dict[str, int]) -> dict[str, Any]:
    stage = moment.stage
    found = []
    for place, node in moment.places():
        text = json.dumps(_version(moment, node, number[place]))
        found.append(pool.setdefault(text, len(pool)))
    return {
        "name": stage.name,
        "options": stage.options,
        "matches": stage.matches,
        "seconds": round(stage.seconds, 4),
        "error": stage.error,
        "nodes": found,
    }


def _version(moment: _Moment, node: Node, place: int) -> list[Any]:
    """A row rather than an object: there are thousands. The page's `Version` says what is what."""
    ids = moment.ids
    inputs = [part for name, id in moment.stage.snapshot.inputs[node.id] for part in (name, ids[id])]
    return [
        place,
        node.name,
        node.op,
        node.target,
        node.short_target,
        [[name, _pieces(argument, ids)] for name, argument in node.arguments],
        ", ".join(map(str, node.values)),
        ", ".join(dict.fromkeys(value.device for value in node.values if value.device)),
        "" if node.free or not node.values else sum_bytes(node.values),
        node.module,
        node.module_type,
        node.graph,
        node.source,
        node.role,
        inputs,
    ]


def _pieces(argument: Argument, ids: dict[int, int]) -> list[str | int]:
    """The argument as a reader writes it, with page ids in the place of nodes; -1 is one that is not in the graph."""
    text = format_argument(argument, lambda id: f"\0{ids.get(id, -1)}\0")
    parts = _MARK.split(text)
    return [int(part) if index % 2 else part for index, part in enumerate(parts) if index % 2 or part]


def _tree_data(root: Group) -> list[list[Any]]:
    """[label, path, alike, items] of each group, the root first; of the items, group g is written as -g."""
    groups = [root]
    rows = []
    for group in groups:
        items = []
        for item in group.items:
            if isinstance(item, Group):
                groups.append(item)
            items.append(1 - len(groups) if isinstance(item, Group) else item)
        rows.append([group.label, group.path, group.alike, items])
    return rows


def _births(moments: Sequence[_Moment]) -> list[list[Any]]:
    """[id, stage, ids that it was copied from or stands for] of each node that is not in the first graph."""
    known = set(moments[0].ids.values())
    found = []
    for index, moment in enumerate(moments[1:], 1):
        stands_for: dict[int, list[int]] = {new: list(old) for new, old in moment.stage.origins.items()}
        for old, news in moment.stage.into.items():
            for new in news:
                stands_for.setdefault(new, []).append(old)
        new_ids = [id for id in moment.ids.values() if id not in known]
        known.update(new_ids)
        found += [[id, index, list(dict.fromkeys(stands_for.get(id, ())))] for id in new_ids]
    return found


def _step_data(
    step: _Step, moments: Sequence[_Moment], order: dict[Place, str], number: dict[Place, int]
) -> dict[str, Any]:
    before, after, diff = step.first.ids, step.last.ids, step.diff
    kinds = list(GLYPHS)
    return {
        "first": moments.index(step.first),
        "last": moments.index(step.last),
        "entries": [
            [
                kinds.index(entry.kind),
                [before[id] for id in entry.before],
                [after[id] for id in entry.after],
                [[change.what, change.before, change.after] for change in entry.changes],
                entry.stage,
            ]
            for entry in diff.changed
        ],
        "blocks": [_block_data(block) for block in diff.blocks],
        "counts": diff.counts,
        "graphs": sorted({node.graph for node in (*diff.before.nodes, *diff.after.nodes) if node.graph}),
        "was": WAS,
        "tree": _tree_data(_tree(step, order, number)),
        "story": asdict(diff.story) | {"headline": headline(diff.story)} if diff.story else None,
    }


def _block_data(block: Block) -> list[Any]:
    """[path, which modules, how many, lines], each line [module, text, times in each module, entries]."""
    lines = [[line.module, line.text, line.count, list(line.entries)] for line in block.content]
    return [block.path, which(block), len(block.modules), lines]
