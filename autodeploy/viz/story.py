"""The story of the metadata: how many nodes became one prepare_metadata, who reads each field, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from autodeploy.graph.edit import PREPARE
from autodeploy.viz.arguments import Ref
from autodeploy.viz.classify import Entry
from autodeploy.viz.node import Node
from autodeploy.viz.snapshot import Snapshot
from autodeploy.viz.values import sum_bytes

_COMPUTES = ("call_function", "call_method")
_SENT = ("", "tokens", "layout")  # roles of inputs that are new in every step; weights and caches are not


@dataclass(frozen=True)
class FieldReaders:
    """One output of prepare_metadata, and how many nodes of each op read it."""

    name: str
    op: str
    value: str
    readers: dict[str, int]


@dataclass(frozen=True)
class Cost:
    """What the metadata costs in each step.

    `launches`: nodes that are neither views nor sizes. `copies`: inputs sent to the device. `bytes`: what the launches
    write, in terms of the symbolic sizes; `unsized` launches are those of unknown shape, not in it.
    """

    nodes: int
    launches: int
    copies: int
    bytes: str
    unsized: int


@dataclass(frozen=True)
class Story:
    """`subgraphs`: parts of the old metadata that read nothing of each other. `beside`: how many sizes and constants
    moved along or were merged with it, which are no metadata.
    """

    subgraphs: int
    beside: int
    fields: tuple[FieldReaders, ...]
    before: Cost
    after: Cost


def tell(before: Snapshot, after: Snapshot, entries: Iterable[Entry]) -> Story | None:
    """The story of the step from `before`, which has no prepare_metadata, to `after`, which has; else None.

    None, too, where something is computed in prepare_metadata that was not there before: over several passes, the story
    is that of the pass that shared it.
    """
    inside = [node for node in after.nodes if _is_inside(node)]
    if not inside or any(_is_inside(node) for node in before.nodes):
        return None
    ids = {node.id for node in inside}
    old: dict[int, Node] = {}
    beside = 0
    for entry in entries:
        nodes = [before.by_id[id] for id in entry.before]
        if not ids.intersection(entry.after):
            beside += len(nodes) if entry.kind in ("moved", "merged") else 0
            continue
        if not nodes and not all(after.by_id[id].free for id in entry.after):
            return None
        old |= {node.id: node for node in nodes if node.op in _COMPUTES}
        beside += sum(node.op not in _COMPUTES for node in nodes)
    return Story(
        subgraphs=_components(before, old),
        beside=beside,
        fields=tuple(_fields(after, inside, ids)),
        before=_cost(before, old.values()),
        after=_cost(after, inside),
    )


def _components(snapshot: Snapshot, ids: Iterable[int]) -> int:
    left = {id for id in ids if snapshot.by_id[id].op != "placeholder"}
    number = 0
    while left:
        number += 1
        pending = [left.pop()]
        while pending:
            edges = (*snapshot.inputs[pending[-1]], *snapshot.users[pending.pop()])
            near = {id for _, id in edges} & left
            left -= near
            pending += near
    return number


def _is_inside(node: Node) -> bool:
    return node.graph.rpartition(".")[2] == PREPARE


def _fields(after: Snapshot, inside: list[Node], ids: set[int]) -> Iterable[FieldReaders]:
    (output,) = (node for node in inside if node.op == "output")
    for _, leaf in output.leaves:
        if not isinstance(leaf, Ref):
            continue
        node = after.by_id[leaf.id]
        users = [after.by_id[user] for user in {user for _, user in after.users[leaf.id]} - ids]
        readers = Counter(user.short_target for user in users if user.id not in after.source_of)
        yield FieldReaders(node.name, node.short_target, ", ".join(map(str, node.values)), dict(readers))


def _cost(snapshot: Snapshot, metadata: Iterable[Node]) -> Cost:
    nodes = [node for node in metadata if node.op in _COMPUTES]
    launches = [node for node in nodes if not node.free]
    inputs = (node for node in snapshot.nodes if node.op == "placeholder" and not node.graph)
    return Cost(
        nodes=len(nodes),
        launches=len(launches),
        copies=sum(node.role in _SENT for node in inputs),
        bytes=sum_bytes(value for node in launches for value in node.values),
        unsized=sum(not node.values for node in launches),
    )
