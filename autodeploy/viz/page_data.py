"""What a page shows, as plain data: a pool of node versions, the graphs they make up, and each step between two graphs.

Node ids are those of a trace. Of a diff, a pair has the id that it has in `after`, and the rest of `before` new ones.
A *place* is a node in one module: a node that moves to another graph or module has two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autodeploy.viz.arguments import Argument, format_argument
from autodeploy.viz.diff import GraphDiff
from autodeploy.viz.fold import GLYPHS, Block
from autodeploy.viz.node import Node
from autodeploy.viz.story import Story
from autodeploy.viz.text import which
from autodeploy.viz.trace import Stage, Trace
from autodeploy.viz.tree import Group, build_tree, split_path
from autodeploy.viz.values import sum_bytes

SCHEMA = "autodeploy.page/1"
INPUTS = "inputs"  # the group of the outermost graph's placeholders

Place = tuple[int, tuple[str, ...]]
_MARK = re.compile("\0(-?\\d+)\0")


@dataclass(frozen=True, eq=False)
class _Moment:
    """One graph, and the page's id of each of its nodes."""

    stage: Stage
    ids: dict[int, int]

    def places(self) -> Iterator[tuple[Place, Node]]:
        """Every node with its place, in order."""
        for node in self.stage.snapshot.nodes:
            yield (self.ids[node.id], _home(node)), node


@dataclass(frozen=True, eq=False)
class _Step:
    """From moment `first` to moment `last`."""

    first: _Moment
    last: _Moment
    diff: GraphDiff
    story: Story | None


def page_data(shown: Trace | GraphDiff) -> dict[str, Any]:
    """The data of a page, ready for JSON."""
    moments = _moments(shown)
    steps = _steps(shown, moments)
    kinds = _kinds(steps)
    order = _in_order(moments)
    boxed = _boxed(moments, {id for id, _ in kinds})
    places = [place for place in order if place in boxed] + [place for place in order if place not in boxed]
    looks = [(order[place], *(kinds.get((place[0], index)) for index in range(len(steps)))) for place in order]
    homes = [home for _, home in places[: len(boxed)]]
    number = {place: index for index, place in enumerate(places)}
    pool: dict[str, int] = {}
    graphs = [_graph_data(moment, number, pool) for moment in moments]
    return {
        "schema": SCHEMA,
        "isHistory": isinstance(shown, Trace),
        "glyphs": GLYPHS,
        "stages": graphs,
        "versions": [json.loads(text) for text in pool],
        "places": [id for id, _ in places],
        "tree": _tree_data(
            build_tree(homes, [look for look, place in zip(looks, order, strict=True) if place in boxed])
        ),
        "births": _births(moments),
        "steps": [_step_data(step, moments) for step in steps],
    }


def _moments(shown: Trace | GraphDiff) -> list[_Moment]:
    if isinstance(shown, Trace):
        return [_Moment(stage, {id: id for id in stage.snapshot.by_id}) for stage in shown.stages]
    new = max((node.id for node in shown.after.nodes), default=0) + 1
    ids = {node.id: new + index for index, node in enumerate(shown.before.nodes)}
    for entry in shown.entries:
        if entry.kind in ("unchanged", "changed", "moved"):
            ids[entry.before[0]] = entry.after[0]
    before, after = (
        Stage(shown.before.title or "before", shown.before),
        Stage(shown.after.title or "after", shown.after),
    )
    return [_Moment(before, ids), _Moment(after, {node.id: node.id for node in shown.after.nodes})]


def _steps(shown: Trace | GraphDiff, moments: Sequence[_Moment]) -> list[_Step]:
    """All passes as one step, then each."""
    if isinstance(shown, GraphDiff):
        return [_Step(moments[0], moments[1], shown, shown.story)]
    last = len(moments) - 1
    diffs = [shown.diff(index, index + 1) for index in range(last)]
    steps = [_Step(moments[index], moments[index + 1], diff, diff.story) for index, diff in enumerate(diffs)]
    if last == 1:
        return steps
    # The pass that made the metadata tells its story best: later ones take its fields apart.
    story = next((step.story for step in steps if step.story), None)
    return [_Step(moments[0], moments[last], shown.diff(), story), *steps]


def _kinds(steps: Sequence[_Step]) -> dict[tuple[int, int], str]:
    """What happened to the node of an id in each step, where it did not stay as it was."""
    found: dict[tuple[int, int], str] = {}
    for index, step in enumerate(steps):
        for entry in step.diff.changed:
            after = () if entry.kind == "merged" else entry.after
            ids = [step.first.ids[id] for id in entry.before] + [step.last.ids[id] for id in after]
            found |= {(id, index): entry.kind for id in ids}
    return found


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


def _boxed(moments: Sequence[_Moment], changed: set[int]) -> set[Place]:
    """All but what only hands a value on, and attributes that nothing happens to: their readers name them."""
    found: set[Place] = set()
    for moment in moments:
        passing = moment.stage.snapshot.source_of
        for place, node in moment.places():
            if node.id not in passing and (node.op != "get_attr" or place[0] in changed):
                found.add(place)
    return found


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


def _step_data(step: _Step, moments: Sequence[_Moment]) -> dict[str, Any]:
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
        "story": asdict(step.story) if step.story else None,
    }


def _block_data(block: Block) -> list[Any]:
    """[path, which modules, how many, lines], each line [module, text, times in each module, entries]."""
    lines = [[line.module, line.text, line.count, list(line.entries)] for line in block.content]
    return [block.path, which(block), len(block.modules), lines]
