"""What differs between the two sides of a pair, and which pairs changed their place."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass

from autodeploy.viz.arguments import Argument, Ref, Text, format_argument
from autodeploy.viz.links import Links
from autodeploy.viz.node import Node
from autodeploy.viz.snapshot import Snapshot
from autodeploy.viz.values import Value

PLACES = frozenset({"graph", "order"})  # changes that make a node moved rather than changed
IGNORABLE = {
    "names": frozenset({"name"}),
    "order": frozenset({"order"}),
    "device": frozenset({"device"}),
    "meta": frozenset({"module", "role"}),
    "wiring": frozenset({"wiring"}),
}
_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_ONE = re.compile(r"(?<![\w*)])1\*(?!\*)|(?<!\*)\*1(?![\w*.])")  # what is left of a symbol that became 1 in a product


@dataclass(frozen=True)
class Change:
    """One difference: `what` is the name of an argument, prefixed by "argument ", "input " or, where it reads an equal
    value from another node, "wiring "; or one of target, shape, dtype, device, values, name, module, role, graph,
    order, into.
    """

    what: str
    before: str
    after: str

    @property
    def kind(self) -> str:
        """`what` without the argument's name."""
        return self.what.partition(" ")[0]

    def __str__(self) -> str:
        return f"{self.what.partition(' ')[2] or self.what}: {self.before or '(none)'} -> {self.after or '(none)'}"


class Comparison:
    """Compares pairs of nodes of two snapshots. A symbol may be another, or a number, in the other."""

    def __init__(self, before: Snapshot, after: Snapshot, links: Links, ignore: frozenset[str]) -> None:
        self.before, self.after, self.links = before, after, links
        self.ignore = ignore
        self.paired = set(links.pairs.values())
        self.symbols = _symbols(before, after, links)
        self.moved = _out_of_order(before, after, links)

    def changes(self, one: Node, other: Node) -> tuple[Change, ...]:
        """All that differs between a pair, in the order of the fields, without what is ignored."""
        found = [*self._plain(one, other), *self._arguments(one, other), *self._values(one, other)]
        if one.id in self.moved:
            place, other_place = self.before.position[one.id], self.after.position[other.id]
            found.append(Change("order", str(place), str(other_place)))
        return tuple(change for change in found if change.kind not in self.ignore)

    def _plain(self, one: Node, other: Node) -> list[Change]:
        pairs = {
            "target": ("", "") if one.op == "placeholder" else (one.target, other.target),
            "name": (one.name, other.name),
            "module": (one.module, other.module),
            "role": (one.role, other.role),
            "graph": (one.graph, other.graph),
            "values": (one.content, other.content) if one.content and other.content else ("", ""),
        }
        if _base(one.name) == _base(other.name):
            del pairs["name"]
        return [Change(what, *pair) for what, pair in pairs.items() if pair[0] != pair[1]]

    def _arguments(self, one: Node, other: Node) -> list[Change]:
        ones, others = dict(one.leaves), dict(other.leaves)
        inputs, other_inputs = dict(self.before.inputs[one.id]), dict(self.after.inputs[other.id])
        found = []
        for place in ones | others:
            leaf, other_leaf = ones.get(place, _ABSENT), others.get(place, _ABSENT)
            reads = isinstance(leaf, Ref) and isinstance(other_leaf, Ref)
            source, other_source = inputs.get(place, _GONE), other_inputs.get(place, _GONE)
            if reads and self._same_input(source, other_source):
                if one.graph == other.graph and self._is_elsewhere(source, other_source):
                    texts = (self.before.name_of(source), self.after.name_of(other_source))
                    found.append(Change(f"wiring {place}", *texts))
                continue
            if reads or self._renamed(leaf) != repr(other_leaf):
                kind = "device" if place == "device" else f"{'input' if reads else 'argument'} {place}"
                texts = (format_argument(leaf, self.before.name_of), format_argument(other_leaf, self.after.name_of))
                found.append(Change(kind, *texts))
        return found

    def _is_elsewhere(self, one: int, other: int) -> bool:
        """Whether the same value is read from a duplicate, or from a graph that it was moved to."""
        before, after = self.before.by_id.get(one), self.after.by_id.get(other)
        return before is not None and after is not None and (one in self.links.merged or before.graph != after.graph)

    def _same_input(self, one: int, other: int) -> bool:
        """Whether `other` stands for `one`, or only new nodes lie between `one` and its reader."""
        images = self.links.images(one)
        pending, seen = [other], {other}
        while pending and len(seen) < _FAR:
            id = pending.pop()
            if id in images or self._is_copy(one, id):
                return True
            inputs = {source for _, source in self.after.inputs.get(id, ())} if id not in self.paired else set()
            pending += inputs - seen
            seen |= inputs
        return False

    def _is_copy(self, one: int, other: int) -> bool:
        """Whether new nodes do again what `one` does: sizes and constants are read on both sides of a border."""
        pending = [(one, other)]
        for old, new in pending:
            if old != one and new in self.links.images(old):
                continue
            if len(pending) > _FAR or new in self.paired or _GONE in (old, new):
                return False
            inputs, new_inputs = self.before.inputs[old], self.after.inputs[new]
            if self.before.by_id[old].label != self.after.by_id[new].label or len(inputs) != len(new_inputs):
                return False
            pending += [(source, new_source) for (_, source), (_, new_source) in zip(inputs, new_inputs, strict=True)]
        return True

    def _renamed(self, leaf: Argument) -> str:
        return repr(Text(self._rename(leaf.text)) if isinstance(leaf, Text) else leaf)

    def _rename(self, text: str) -> str:
        renamed = _SYMBOL.sub(lambda found: self.symbols.get(found[0], found[0]), text)
        return _ONE.sub("", renamed) if renamed != text else text

    def _values(self, one: Node, other: Node) -> list[Change]:
        if not one.values or not other.values:
            return []
        if len(one.values) != len(other.values):
            return [Change("shape", f"{len(one.values)} values", f"{len(other.values)} values")]
        found: dict[str, Change] = {}
        for before, after in zip(one.values, other.values, strict=True):
            for change in self._value(before, after):
                found.setdefault(change.what, change)
        return list(found.values())

    def _value(self, one: Value, other: Value) -> list[Change]:
        found = []
        if self._rename(_shape(one)) != _shape(other):
            found.append(Change("shape", _shape(one), _shape(other)))
        for what in ("dtype", "device"):
            pair = (getattr(one, what), getattr(other, what))
            if pair[0] != pair[1]:
                found.append(Change(what, *pair))
        return found


_ABSENT = Text("(absent)")
_FAR = 64  # nodes that may be put between two others
_GONE = -1  # what a broken graph reads that is not in it


def _base(name: str) -> str:
    """A name without the number that FX appends to keep names apart."""
    return name.rstrip("0123456789").rstrip("_")


def _shape(value: Value) -> str:
    return value.text if value.shape is None else f"[{', '.join(map(str, value.shape))}]"


def _symbols(before: Snapshot, after: Snapshot, links: Links) -> dict[str, str]:
    """Each symbol of `before` with what stands for it in `after`, a symbol or a number, by most of the pairs."""
    found: dict[str, Counter[str]] = {}
    for one, other in links.pairs.items():
        for value, other_value in zip(before.by_id[one].values, after.by_id[other].values, strict=False):
            shape, other_shape = value.shape or (), other_value.shape or ()
            for size, other_size in zip(shape, other_shape, strict=False) if len(shape) == len(other_shape) else ():
                if _is_symbol(size) and (_is_symbol(other_size) or isinstance(other_size, int)):
                    found.setdefault(str(size), Counter())[str(other_size)] += 1
    return {symbol: names.most_common(1)[0][0] for symbol, names in found.items()}


def _is_symbol(size: int | str) -> bool:
    return isinstance(size, str) and size.isidentifier()


def _out_of_order(before: Snapshot, after: Snapshot, links: Links) -> set[int]:
    """The fewest nodes of `before` that have to move for the pairs of each graph to be in the order of `after`."""
    tracks: dict[tuple[str, str], list[int]] = {}
    for node in before.nodes:
        if node.id in links.pairs:
            other = after.by_id[links.pairs[node.id]]
            tracks.setdefault((node.graph, other.graph), []).append(node.id)
    moved: set[int] = set()
    for ids in tracks.values():
        places = [after.position[links.pairs[id]] for id in ids]
        stay = _longest_increasing(places)
        moved |= {id for index, id in enumerate(ids) if index not in stay}
    return moved


def _longest_increasing(values: list[int]) -> set[int]:
    """Indices of a longest increasing subsequence, by patience sorting."""
    tops: list[int] = []
    top_index: list[int] = []
    previous: list[int] = []
    for index, value in enumerate(values):
        pile = bisect_left(tops, value)
        previous.append(top_index[pile - 1] if pile else -1)
        tops[pile : pile + 1] = [value]
        top_index[pile : pile + 1] = [index]
    found, index = set(), top_index[-1] if top_index else -1
    while index >= 0:
        found.add(index)
        index = previous[index]
    return found
