"""Sorts the nodes of two linked snapshots into what happened to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autodeploy.errors import UnknownName
from autodeploy.viz.changes import IGNORABLE, PLACES, Change, Comparison
from autodeploy.viz.links import Links
from autodeploy.viz.snapshot import Snapshot

KINDS = ("unchanged", "changed", "moved", "rewired", "merged", "replaced", "removed", "added")

PAIRED = ("unchanged", "changed", "moved", "rewired")  # one node on each side


@dataclass(frozen=True)
class Entry:
    """One thing that happened: to a pair ("unchanged", "changed", "moved", or "rewired": it reads equal values from
    other nodes), to nodes of one side ("removed", "added"), to a group of nodes for which another group stands now
    ("replaced"), or to nodes that were dropped because `after` computes the same ("merged").

    `before` and `after` are ids in their snapshots' order; `stage` is what linked them.
    """

    kind: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    changes: tuple[Change, ...] = ()
    stage: str = ""


def classify(before: Snapshot, after: Snapshot, links: Links, ignore: Iterable[str] = ()) -> tuple[Entry, ...]:
    """Every node of both sides in one entry, except that the survivor of a merger also has one of its own.

    Entries are in the order of `before`; what is new comes after what precedes it in `after`. Raises UnknownName for
    something to ignore that is not in `IGNORABLE`.
    """
    ignore = list(ignore)
    for name in ignore:
        if name not in IGNORABLE:
            raise UnknownName("thing to ignore", name, IGNORABLE)
    ignored = frozenset().union(*(IGNORABLE[name] for name in ignore))
    entries = [*_pairs(before, after, links, ignored), *_merged(links, before)]
    entries += _lone(before, after, links)
    return tuple(sorted(entries, key=_place(before, after, links)))


def _pairs(before: Snapshot, after: Snapshot, links: Links, ignored: frozenset[str]) -> Iterable[Entry]:
    comparison = Comparison(before, after, links, ignored)
    for one, other in links.pairs.items():
        changes = comparison.changes(before.by_id[one], after.by_id[other])
        yield Entry(_kind(changes), (one,), (other,), changes, links.stages[one])


def _kind(changes: tuple[Change, ...]) -> str:
    kinds = {change.kind for change in changes}
    if not kinds:
        return "unchanged"
    if kinds <= PLACES:
        return "moved"
    return "rewired" if kinds == {"wiring"} else "changed"


def _merged(links: Links, before: Snapshot) -> Iterable[Entry]:
    groups: dict[int, list[int]] = {}
    for duplicate, survivor in links.merged.items():
        groups.setdefault(survivor, []).append(duplicate)
    for survivor, duplicates in groups.items():
        yield Entry("merged", tuple(sorted(duplicates, key=before.position.__getitem__)), (survivor,))


def _lone(before: Snapshot, after: Snapshot, links: Links) -> Iterable[Entry]:
    """Nodes without partner: groups that stand for each other, and the rest."""
    paired = set(links.pairs.values())
    removed = {node.id for node in before.nodes if node.id not in links.pairs and node.id not in links.merged}
    added = {node.id for node in after.nodes if node.id not in paired}
    group = _groups(links, removed, added)
    ones = _absorb(before, removed, {id: group[("before", id)] for id in removed if ("before", id) in group})
    others = _absorb(after, added, {id: group[("after", id)] for id in added if ("after", id) in group})
    members: dict[object, tuple[list[int], list[int]]] = {}
    for side, snapshot, found in ((0, before, ones), (1, after, others)):
        for node in snapshot.nodes:
            if node.id in found:
                members.setdefault(found[node.id], ([], []))[side].append(node.id)
    yield from (Entry("replaced", tuple(old), tuple(new)) for old, new in members.values())
    for id in removed - ones.keys():
        into = [Change("into", before.name_of(id), after.name_of(new)) for new in links.into.get(id, ())]
        yield Entry("removed", (id,), changes=tuple(into))
    yield from (Entry("added", after=(id,)) for id in added - others.keys())


_Member = tuple[str, int]


def _groups(links: Links, removed: set[int], added: set[int]) -> dict[_Member, _Member]:
    """A representative for every node that stands for a removed one, and for that one: equal within a group."""
    parent: dict[_Member, _Member] = {}

    def find(member: _Member) -> _Member:
        parent.setdefault(member, member)
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for old, news in links.into.items():
        for new in news:
            if old in removed and new in added:
                parent[find(("after", new))] = find(("before", old))
    return {member: find(member) for member in list(parent)}


def _absorb(snapshot: Snapshot, lone: set[int], group: dict[int, _Member]) -> dict[int, _Member]:
    """`group`, and with it the lone nodes that only nodes of one group read: they are its inside."""
    found = dict(group)
    # Users come after what they read, except in a graph that another one calls.
    pending = sorted(lone - found.keys(), key=snapshot.position.__getitem__)
    while pending:
        left = []
        for id in reversed(pending):
            groups = {found.get(user) for _, user in snapshot.users[id]}
            if len(groups) == 1 and (only := groups.pop()) is not None:
                found[id] = only
            else:
                left.append(id)
        if len(left) == len(pending):
            break
        pending = left[::-1]
    return found


def _place(before: Snapshot, after: Snapshot, links: Links):
    """Sort key of entries: place in `before`, or that of the last pair before it in `after`."""
    back = {other: one for one, other in links.pairs.items()}
    anchor, last = {}, -1
    for node in after.nodes:
        last = before.position[back[node.id]] if node.id in back else last
        anchor[node.id] = last

    def place(entry: Entry) -> tuple[int, bool, int]:
        if entry.before:
            return (before.position[entry.before[0]], entry.kind == "merged", 0)
        return (anchor[entry.after[0]], True, after.position[entry.after[0]])

    return place
