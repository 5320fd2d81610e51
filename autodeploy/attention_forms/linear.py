"""Which biases are ALiBi (Press et al., arXiv 2108.12409): one slope per head times the distance from query to key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodeploy.attention_forms.asked import Masks, Seen
from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.places import Value, look_up, number, places_of
from autodeploy.attention_forms.scores import Term
from autodeploy.attention_forms.square import Square
from autodeploy.graph.meta import VALUE

_ROUNDINGS = 4  # of what an entry is made of: product, shift, their difference, and the slope that was read from them
_EPS = torch.finfo(torch.float32).eps
_ROUNDED = (torch.float16, torch.bfloat16)
_SUMS = {"add": 1.0, "sub": -1.0, "subtract": -1.0}
_LIMITS = {"clamp", "clamp_min", "clamp_max", "relu"}


@dataclass(frozen=True)
class _Linear:
    """query_L[i] + key_L[j] + length · S, in float64."""

    query_L: Tensor
    key_L: Tensor
    length: float = 0.0

    def times(self, factor: float) -> _Linear:
        return _Linear(self.query_L * factor, self.key_L * factor, self.length * factor)

    def plus(self, other: _Linear) -> _Linear:
        return _Linear(self.query_L + other.query_L, self.key_L + other.key_L, self.length + other.length)

    def reach(self) -> float:
        farthest = abs(self.length) * len(self.key_L)
        return float(self.query_L.abs().max() + self.key_L.abs().max()) + farthest


@dataclass(frozen=True)
class Alibi:
    """`slopes` [H] float32, and the most that the bias adds or takes away."""

    slopes: Tensor
    reach: float


def read_alibi(masks: Masks, term: Term, num_heads: int, seen: Seen, *, has_sinks: bool) -> Alibi | None:
    """What `term` is if it, being known, adds slope · (j - i) to what query i sees of key j; else None.

    Without sinks it may add anything more that is the same for all keys of a query: a softmax does not see it.
    """
    if term.role != "add":
        return None
    values = masks.values
    head, row = values.place("head", num_heads), values.place("row")
    places = {3: [values.merged(row, head, num_heads)], 4: [row, head]}.get(len(term.shape))
    if places is None:
        places = [row, *values.parts(head, num_heads // term.shape[1])]
    slopes, reach = [], 0.0
    try:
        entry, square = masks.unfold(term, places)
        for index in range(num_heads):
            of_head = values.replace(entry, {head: values.constant(torch.tensor([index]), 0)})
            linear = _Reader(masks, square, seen).read(of_head).times(term.factor)
            slope = _slope(linear, has_sinks)
            if slope is None:
                return None
            slopes.append(slope)
            reach = max(reach, linear.reach())
    except Refused:
        return None
    masks.note(term)
    return Alibi(torch.tensor(slopes, dtype=torch.float32, device=VALUE.of(term.node).device), reach)


def _slope(bias: _Linear, has_sinks: bool) -> float | None:
    index_L = torch.arange(len(bias.key_L), dtype=torch.float64)
    slope = float((bias.key_L[-1] - bias.key_L[0]) / max(1, len(index_L) - 1))
    if not _is_line(bias.key_L, slope):
        return None
    if has_sinks and (bias.length or not _is_line(bias.query_L, -slope, -float(bias.key_L[0]))):
        return None
    return slope


def _is_line(value_L: Tensor, slope: float, start: float | None = None) -> bool:
    """Whether the entries are `start` + slope · index, but for the rounding of what each is made of."""
    line_L = torch.arange(len(value_L), dtype=torch.float64) * slope
    start = float(value_L[0]) if start is None else start
    bound_L = _ROUNDINGS * _EPS * (value_L.abs() + line_L.abs() + abs(start))
    return bool(((value_L - start - line_L).abs() <= bound_L).all())


class _Reader:
    """Reads a value as something of the query plus something of the key, as far as pairs that are seen show it."""

    def __init__(self, masks: Masks, square: Square, seen: Seen) -> None:
        self._values, self._square, self._seen = masks.values, square, seen

    def read(self, value: Value) -> _Linear:
        """Raises Refused where `value` is anything else."""
        # In 16 bits distances are rounded, but only at lengths that nobody may have tried.
        if value.dtype in _ROUNDED:
            raise Refused("is rounded to 16 bits")
        if value.op is number:
            zeros_L = torch.zeros(self._square.longest, dtype=torch.float64)
            return _Linear(zeros_L, zeros_L + value.args[2], float(value.args[1]))
        if len(places_of(value)) < 2 and self._values.length not in places_of(value):
            return self._line(value)
        return self._combined(value, value.word)

    def _line(self, value: Value) -> _Linear:
        line_L, end = self._square.line(value)
        if end < self._square.longest:
            raise Refused("cannot be asked: it ends before the largest position")
        line_L, zeros_L = line_L.double(), torch.zeros(len(line_L), dtype=torch.float64)
        return _Linear(line_L, zeros_L) if places_of(value) == {self._values.query} else _Linear(zeros_L, line_L)

    def _combined(self, value: Value, name: str) -> _Linear:
        if name in _SUMS and not value.kwargs:
            one, other = (self._operand(arg) for arg in value.args)
            return one.plus(other.times(_SUMS[name]))
        if name in ("mul", "multiply"):
            one, other = value.args
            factor = self._constant(other)
            return self._operand(one).times(factor) if factor is not None else self._operand(other).times(
                self._needed(one)
            )  # fmt: skip
        if value.op is look_up:
            return self._looked_up(value)
        if name in ("div", "divide", "true_divide") and not value.kwargs:
            return self._operand(value.args[0]).times(1 / self._needed(value.args[1]))
        inner = self._operand(value.args[0])
        if name in ("neg", "negative"):
            return inner.times(-1)
        if name == "to" and value.dtype is not None and value.dtype.is_floating_point:
            return inner
        if name in ("abs", "absolute"):
            low, high = self._range(inner)
            if low >= 0 or high <= 0:
                return inner.times(1 if low >= 0 else -1)
        if name in _LIMITS and self._is_idle(value, inner):
            return inner
        raise Refused("is not a sum of something of the query and something of the key")

    def _looked_up(self, value: Value) -> _Linear:
        """An entry of a table whose entries lie on a line."""
        table, *indices = value.args
        moving = [dim for dim, index in enumerate(indices) if isinstance(index, Value) and places_of(index)]
        if len(moving) != 1:
            raise Refused("is looked up by more than one place")
        fixed = [self._constant(index) for index in indices]
        row = table[
            tuple(slice(None) if dim in moving else int(index or 0) for dim, index in enumerate(fixed))
        ].double()
        slope = float((row[-1] - row[0]) / max(1, len(row) - 1))
        if not _is_line(row, slope):
            raise Refused("is looked up in a table that is no line")
        index = self._operand(indices[moving[0]])
        return index.times(slope).plus(self._operand(float(row[0])))

    def _operand(self, arg: Any) -> _Linear:
        if isinstance(arg, Value):
            return self.read(arg)
        zeros_L = torch.zeros(self._square.longest, dtype=torch.float64)
        return _Linear(zeros_L, zeros_L + float(arg))

    def _constant(self, arg: Any) -> float | None:
        if not isinstance(arg, Value):
            return float(arg)
        return None if places_of(arg) else float(self._square.line(arg)[0][0])

    def _needed(self, arg: Any) -> float:
        factor = self._constant(arg)
        if not factor:
            raise Refused("is a product of what depends on positions")
        return factor

    def _range(self, of: _Linear) -> tuple[float, float]:
        """The least and the greatest value among pairs that are seen."""
        if of.length:
            raise Refused("differs with the length")
        key_L = of.key_L
        highest_L, lowest_L = (
            (key_L.cummax(0).values, key_L.cummin(0).values)
            if self._seen.causal
            else (key_L.max().expand_as(key_L), key_L.min().expand_as(key_L))
        )
        return float((of.query_L + lowest_L).min()), float((of.query_L + highest_L).max())

    def _is_idle(self, value: Value, inner: _Linear) -> bool:
        """Whether a limit is never reached."""
        low, high = self._range(inner)
        name = value.word
        limits = [arg if arg is None else self._needed_limit(arg) for arg in (*value.args[1:], *value.kwargs.values())]
        if name == "relu":
            limits = [0.0]
        least = limits[0] if name in ("clamp", "clamp_min", "relu") else None
        greatest = limits[-1] if name == "clamp_max" or (name == "clamp" and len(limits) > 1) else None
        return (least is None or low >= least) and (greatest is None or high <= greatest)

    def _needed_limit(self, arg: Any) -> float:
        limit = self._constant(arg)
        if limit is None:
            raise Refused("is limited by what depends on positions")
        return limit
