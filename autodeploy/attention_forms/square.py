"""Whether something holds for every pair of a query and a key up to the largest position, proved and not sampled.

The square of all pairs is cut into blocks. Where bounds settle a block, all its pairs are settled; the others are cut
on, and the smallest are computed pair by pair. A causal mask of 2^20 positions takes some 2^17 blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from autodeploy.attention_forms.bounds import Bounds, bounds_of
from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.places import Value, Values, compute, ordered, places_of

_FAN = 4  # into how many rows and columns a block is cut
_LEAF = 16  # rows and columns of a block that is computed pair by pair
_SMALL = 1024  # rows and columns of blocks below which bounds would cost more than pairs
_MAX_PAIRS = 1 << 27  # that are computed for one question
_CHUNK = 1 << 20  # pairs at a time


class Square:
    """The pairs of a query and a key below `longest`.

    Tables may end earlier: a graph that would read beyond one has no such sequences, and is asked below that place.
    """

    def __init__(self, values: Values, longest: int) -> None:
        self._values = values
        self.longest = longest
        self._lines: dict[Value, tuple[Tensor, int]] = {}
        self._ends: dict[tuple[Value, int], Bounds] = {}
        self._answers: dict[Value, bool | Refused] = {}

    def holds(self, value: Value) -> bool:
        """Whether the bool `value` is true of all pairs. Raises Refused where that cannot be decided."""
        if value not in self._answers:
            try:
                self._answers[value] = self._prove(value)
            except Refused as refused:
                self._answers[value] = refused
        answer = self._answers[value]
        if isinstance(answer, Refused):
            raise answer
        return answer

    def at(self, value: Value, query: Tensor, key: Tensor) -> tuple[Tensor, int]:
        """`value` at pairs of places that broadcast, and the first place that it is not defined at, or `longest`."""
        self._check_places(value)
        known: dict[Value, Any] = {self._values.query: query, self._values.key: key}
        result, end = self._compute(value, known, torch.maximum(query, key))
        return torch.broadcast_to(result, torch.broadcast_shapes(query.shape, key.shape)), end

    def line(self, value: Value) -> tuple[Tensor, int]:
        """`value`, which depends on one place at most, at every place [L], and the first that it is not defined at."""
        if value not in self._lines:
            self._check_places(value)
            index_L = torch.arange(self.longest)
            known: dict[Value, Any] = {self._values.query: index_L, self._values.key: index_L}
            result, end = self._compute(value, known, index_L)
            self._lines[value] = result.expand(self.longest), end
        return self._lines[value]

    def end_of(self, value: Value) -> int:
        """The first place that a table of `value` may end before; `longest` where none does."""
        lines = [each for each in ordered(value) if len(places_of(each)) < 2]
        return min([self.longest, *(self.line(each)[1] for each in lines)])

    def every_query_sees(self, value: Value) -> bool:
        """Whether each query has a key, its own or one before it, that the bool `value` is true of."""
        index_L = torch.arange(self.longest)
        seen_L, end = self.at(value, index_L, index_L)
        for other_L in (torch.zeros_like(index_L), (index_L - 1).clamp_min(0)):
            more_L, other_end = self.at(value, index_L, other_L)
            seen_L, end = seen_L | more_L, min(end, other_end)
        blind = index_L[:end][~seen_L[:end]]
        if blind.numel() * end > _MAX_PAIRS:
            raise Refused("has a mask that may hide everything from some query")
        for rows in blind.split(max(1, _CHUNK // end)):
            sees, later_end = self.at(value, rows[:, None], index_L[None, :end])
            is_blind = ~(sees & (index_L[None, :end] <= rows[:, None])).any(-1)
            if bool((is_blind & (rows < later_end)).any()):
                return False
        return True

    def _check_places(self, value: Value) -> None:
        if not places_of(value) <= {self._values.query, self._values.key}:
            raise Refused("cannot be asked: it differs with the length, the head or the row of the batch")

    def _compute(self, value: Value, known: dict[Value, Any], places: Tensor) -> tuple[Tensor, int]:
        end = self.longest

        def entry(table: Tensor, *indices: Any) -> Tensor:
            nonlocal end
            found, is_beyond = _look_up(table, indices)
            if bool(is_beyond.any()):
                where, what = torch.broadcast_tensors(places, is_beyond)
                end = min(end, int(where[what].min()))
            return found

        result = compute(value, known, entry)
        return torch.as_tensor(result), end

    def _prove(self, value: Value) -> bool:
        self._check_places(value)
        if len(places_of(value)) < 2:
            line_L, end = self.line(value)
            return bool(line_L[:end].all())
        both = [each for each in ordered(value) if len(places_of(each)) == 2]
        single = dict.fromkeys(arg for each in both for arg in each.inputs if len(places_of(arg)) < 2)
        end = min(self.line(each)[1] for each in single)
        side = _LEAF
        while side < end:
            side *= _FAN
        blocks_N2 = torch.zeros(1, 2, dtype=torch.int64)
        while side > _LEAF:
            side //= _FAN
            blocks_N2 = _cut(blocks_N2)
            blocks_N2 = blocks_N2[(blocks_N2 * side < end).all(-1)]
            if side > _SMALL or len(blocks_N2) * side**2 > _CHUNK:
                bounds = self._bounds(both, single, blocks_N2, side)
                if bool((bounds.known & ~bounds.high).any()):
                    return False
                blocks_N2 = blocks_N2[~(bounds.known & bounds.low)]
            if len(blocks_N2) * _LEAF**2 > _MAX_PAIRS:
                raise Refused("cannot be asked: it would take too long up to the largest position")
        return all(self._hold(value, single, some_N2, end) for some_N2 in blocks_N2.split(_CHUNK // _LEAF**2))

    def _bounds(self, both: list[Value], single: Iterable[Value], blocks_N2: Tensor, side: int) -> Bounds:
        """The bounds of the last of `both` over blocks of that many rows and columns."""
        found: dict[Value, Bounds] = {}
        for each in single:
            ends = self._ends_of_line(each, side)
            if places_of(each):
                index_N = blocks_N2[:, 0 if places_of(each) == {self._values.query} else 1]
                ends = Bounds(ends.low[index_N], ends.high[index_N], ends.known[index_N])
            found[each] = ends
        for each in both:
            args = [found[arg] if isinstance(arg, Value) else arg for arg in each.args]
            found[each] = bounds_of(each, args, len(blocks_N2))
        return found[both[-1]]

    def _ends_of_line(self, value: Value, side: int) -> Bounds:
        """The least and the greatest entry of a line [L] in each stretch of `side` places."""
        if (value, side) not in self._ends:
            line_L, _ = self.line(value)
            if not places_of(value):
                line_L = line_L[:1]
            size = -(-len(line_L) // side) * side
            line_NS = torch.cat([line_L, line_L[-1:].expand(size - len(line_L))]).view(-1, side)
            numbers_NS = line_NS.byte() if line_NS.dtype is torch.bool else line_NS
            low_N, high_N = (found_N.to(line_L.dtype) for found_N in torch.aminmax(numbers_NS, dim=1))
            self._ends[value, side] = Bounds.of(low_N, high_N)
        return self._ends[value, side]

    def _hold(self, value: Value, single: Iterable[Value], blocks_N2: Tensor, end: int) -> bool:
        """Whether `value` holds in blocks of the smallest size, below `end`."""
        offset = torch.arange(_LEAF)
        query_N11 = (blocks_N2[:, 0, None, None] * _LEAF + offset[:, None]).clamp_max(end - 1)
        key_N11 = (blocks_N2[:, 1, None, None] * _LEAF + offset).clamp_max(end - 1)
        places = {self._values.query: query_N11, self._values.key: key_N11}
        known: dict[Value, Any] = dict(places)
        for each in single:
            of = places_of(each)
            known[each] = self.line(each)[0][places[next(iter(of))]] if of else self.line(each)[0][:1]
            if each.is_scalar:
                known[each] = self.line(each)[0][0]
        farther = torch.maximum(query_N11, key_N11)
        holds, later_end = self._compute(value, known, farther)
        return bool((holds | (farther >= later_end)).all())


def _cut(blocks_N2: Tensor) -> Tensor:
    """Each block, known by its row and column, as _FAN x _FAN blocks of a smaller size."""
    offset_FF2 = torch.cartesian_prod(torch.arange(_FAN), torch.arange(_FAN))
    return (blocks_N2[:, None] * _FAN + offset_FF2).reshape(-1, 2)


def _look_up(table: Tensor, indices: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Entries of `table`, and where there is none."""
    if not indices:
        return table, torch.zeros((), dtype=torch.bool)
    indices = torch.broadcast_tensors(*(torch.as_tensor(index) for index in indices))
    sizes = list(zip(indices, table.shape, strict=True))
    is_beyond = torch.stack([(index < -size) | (index >= size) for index, size in sizes]).any(0)
    inside = [index.clamp(-size, size - 1) for index, size in sizes]
    return table[tuple(inside)], is_beyond
