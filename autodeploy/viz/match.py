"""Finds which nodes of two graphs are the same, where nobody watched how one became the other.

Each stage takes what those before it left over: first what is certain, last what is only alike. A key that several
nodes share is used only where there are as many of them on both sides, and then in graph order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping

from autodeploy.errors import OptionError
from autodeploy.viz.links import Links
from autodeploy.viz.side import Side, merkle, refine
from autodeploy.viz.similar import pair_similar
from autodeploy.viz.snapshot import Snapshot

_NAMED = ("placeholder", "get_attr", "call_module", "output")  # the target says which
Keys = dict[int, Hashable]
HOPS = (3, 1, 0)  # how far around a node the module-path stage looks, in turn


def match(before: Snapshot, after: Snapshot, manual: Mapping[str, str] | None = None) -> Links:
    """Pairs of nodes that are the same, each with its stage.

    Stages, in order: "manual" (names given by the caller, before to after), "merkle" (equal down to the graph's inputs
    and up to its outputs), "path" (module path, op and literals, told apart by their neighbourhood), "inputs" and
    "outputs" (equal down or up, whatever the module), "neighbours" (next to a pair, to a fixed point), "similar" (the
    same op next to a pair or in the same module, with other literals).
    Raises OptionError for a manual name that no node has.
    """
    matcher = _Matcher(Side(before), Side(after), Links())
    matcher.add_named(manual or {})
    one, other = matcher.sides
    for side in matcher.sides:
        side.below, side.above = merkle(side)
    matcher.add_equal("merkle", lambda side: {id: (side.below[id], side.above[id], side.path[id]) for id in side.left})
    matcher.add_survivors()
    matcher.add_neighbours()
    for hops in HOPS:
        matcher.add_equal("path", lambda side, hops=hops: _around(side, hops), repeated=hops == HOPS[0])
        matcher.add_neighbours()
    matcher.widen({side: side.label for side in matcher.sides})
    matcher.add_equal("inputs", lambda side: {id: side.below[id] for id in side.left}, repeated=False)
    matcher.add_equal("outputs", lambda side: {id: side.above[id] for id in side.left}, repeated=False)
    matcher.add_neighbours()
    matcher.add_equal("path", lambda side: _around(side, 0))
    matcher.add_neighbours()
    matcher.widen({side: _ops(side) for side in matcher.sides}, "similar")
    while pair_similar(one, other, matcher.links, matcher.pair):
        matcher.add_neighbours("similar")
    return matcher.links


def _ops(side: Side) -> dict[int, Hashable]:
    """What each node does, whatever its literals; a name is as good as another."""
    return {node.id: node.op if node.op in _NAMED else (node.op, node.short_target) for node in side.snapshot.nodes}


def _around(side: Side, hops: int) -> Keys:
    keys: Keys = {id: (side.path[id], side.label[id]) for id in side.left}
    if hops:
        return refine(side, keys, hops)
    # Without a module, an op and its literals say little.
    return {id: key for id, key in keys.items() if side.path[id] or side.snapshot.by_id[id].op in _NAMED}


class _Matcher:
    def __init__(self, before: Side, after: Side, links: Links) -> None:
        self.sides = (before, after)
        self.links = links
        self.fresh: list[tuple[int, int]] = []  # pairs whose neighbours were not looked at yet
        self.alike: dict[Side, dict[int, Hashable]] = {
            side: {id: (side.path[id], label) for id, label in side.label.items()} for side in self.sides
        }

    def pair(self, before: int, after: int, stage: str) -> None:
        self.links.pair(before, after, stage)
        self.fresh.append((before, after))
        anchor = len(self.links.pairs)
        for side, id in zip(self.sides, (before, after), strict=True):
            del side.left[id]
            side.anchor[id] = anchor

    def add_named(self, names: Mapping[str, str]) -> None:
        known = [{node.name: node.id for node in reversed(side.snapshot.nodes)} for side in self.sides]
        for pair in names.items():
            for name, ids, side in zip(pair, known, ("before", "after"), strict=True):
                if name not in ids:
                    raise OptionError(f"no node is called {name!r} in the graph {side}")
            self.pair(known[0][pair[0]], known[1][pair[1]], "manual")

    def add_equal(self, stage: str, key_of: Callable[[Side], Keys], *, repeated: bool = True) -> None:
        """Pair nodes of equal keys; `repeated` says whether a key may be that of several nodes."""
        groups = [_grouped(key_of(side)) for side in self.sides]
        for key, ids in groups[0].items():
            others = groups[1].get(key, [])
            if len(ids) == len(others) and (repeated or len(ids) == 1):
                for pair in zip(ids, others, strict=True):
                    self.pair(*pair, stage)

    def add_survivors(self) -> None:
        """Pair what is left of equal computations with the first of those there were, of the same module if any is."""
        one, other = self.sides
        twins = [_grouped({id: side.below[id] for id in side.left}) for side in self.sides]
        for key, ids in twins[0].items():
            survivors = twins[1].get(key, [])
            if len(ids) <= len(survivors):
                continue
            for survivor in survivors:
                first = min(ids, key=lambda id: one.path[id] != other.path[survivor])
                ids.remove(first)
                self.pair(first, survivor, "merkle")

    def add_neighbours(self, stage: str = "neighbours") -> None:
        """Pair what pairs read at the same place, and their only users of a kind, until nothing is added."""
        while self.fresh:
            before, after = self.fresh.pop()
            one, other = self.sides
            self._pair_unique(stage, self._left(one, one.inputs[before]), self._left(other, other.inputs[after]))
            self._pair_unique(stage, self._left(one, one.users[before]), self._left(other, other.users[after]))

    def widen(self, alike: dict[Side, dict[int, Hashable]], stage: str = "neighbours") -> None:
        """Look at the neighbours of all pairs again, by what is alike now."""
        self.alike = alike
        self.fresh = list(self.links.pairs.items())
        self.add_neighbours(stage)

    def _left(self, side: Side, edges: Iterable[tuple[str, int]]) -> dict[Hashable, set[int]]:
        """Unpaired ends of `edges` by place and what makes them alike."""
        alike = self.alike[side]
        groups: dict[Hashable, set[int]] = {}
        for place, id in edges:
            if id in side.left:
                groups.setdefault((place, alike[id]), set()).add(id)
        return groups

    def _pair_unique(self, stage: str, ones: dict[Hashable, set[int]], others: dict[Hashable, set[int]]) -> None:
        for key, ids in ones.items():
            found = others.get(key, set())
            if not len(ids) == len(found) == 1:
                continue
            (before,), (after,) = ids, found
            if before in self.sides[0].left and after in self.sides[1].left:
                self.pair(before, after, stage)


def _grouped(keys: Keys) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for id, key in keys.items():
        groups.setdefault(key, []).append(id)
    return groups
