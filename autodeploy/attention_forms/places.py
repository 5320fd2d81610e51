"""Values as functions of places: what one entry of a tensor is, given where its query and its key stand.

A mask `arange(S)[None, :] <= arange(S)[:, None]` becomes `le(key, query)`, which is asked for any pair of places at
once, at any length, without ever holding a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autodeploy.attention_forms.evaluate import Refused

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Value:
    """`op` of `args`, which are values, tensors and numbers; a place where there is no `op`.

    Equal values of one `Values` are one object. `is_scalar`: it stands for a tensor without dimensions, which counts
    for less where dtypes are promoted. `size`: a place is below it, where that is known.
    """

    op: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    is_scalar: bool = False
    places: frozenset[Value] = frozenset()
    size: int | None = None
    name: str = ""

    @property
    def word(self) -> str:
        """The name of its op, without namespace and overload."""
        if isinstance(self.op, torch._ops.OpOverload):
            return self.op._schema.name.split("::")[-1]
        return getattr(self.op, "__name__", "")

    @property
    def inputs(self) -> Iterator[Value]:
        return (arg for arg in (*self.args, *self.kwargs.values()) if isinstance(arg, Value))


def merge(outer: Any, inner: Any, inner_size: int) -> Any:
    """The place in a dimension that two others were flattened to."""
    return outer * inner_size + inner


def number(length: int, factor: int, offset: int) -> int:
    """A Python number that depends on the sequence's length."""
    return factor * length + offset


def look_up(table: Tensor, *indices: Any) -> Tensor:
    """One entry of a constant per place."""
    if not indices:
        return table
    tensors = torch.broadcast_tensors(*(torch.as_tensor(index) for index in indices))
    return table[tuple(tensors)]


class Values:
    """Makes values, each once; `query`, `key` and `length` are the places that all of them share."""

    def __init__(self) -> None:
        self._made: dict[Any, Value] = {}
        self._tensors: list[Tensor] = []  # alive, as they are known by their ids
        self.query, self.key = self.place("query"), self.place("key")
        self.length = self.place("length")

    def place(self, name: str, size: int | None = None) -> Value:
        key = ("place", name, size)
        if key not in self._made:
            self._made[key] = Value(None, dtype=torch.int64, size=size, name=name)
        return self._made[key]

    def apply(
        self,
        op: Callable[..., Any],
        *args: Any,
        dtype: torch.dtype | None = None,
        is_scalar: bool = False,
        **kwargs: Any,
    ) -> Value:
        """`op` of values and of what else it takes; `dtype` is what it must give."""
        named = ((name, self._key(arg)) for name, arg in kwargs.items())
        key = (op, tuple(map(self._key, args)), tuple(named), is_scalar)
        if key not in self._made:
            inputs = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value)]
            places = frozenset[Value]().union(*(places_of(value) for value in inputs))
            self._made[key] = Value(op, args, kwargs, dtype, is_scalar, places)
        return self._made[key]

    def constant(self, table: Tensor, *indices: Any) -> Value:
        """An entry of `table`; a value of no dimensions where that has none."""
        table = table.detach().cpu()
        return self.apply(look_up, table, *indices, dtype=table.dtype, is_scalar=not table.dim())

    def merged(self, outer: Any, inner: Any, inner_size: int) -> Any:
        if isinstance(outer, int) and isinstance(inner, int):
            return merge(outer, inner, inner_size)
        return self.apply(merge, outer, inner, inner_size, dtype=torch.int64)

    def parts(self, merged: Any, inner_size: int) -> tuple[Any, Any]:
        """The places, outer and inner, that `merged` stands for."""
        if isinstance(merged, int):
            return divmod(merged, inner_size)
        if merged.op is merge and merged.args[2] == inner_size:
            return merged.args[0], merged.args[1]
        outer = self.apply(aten.floor_divide.default, merged, inner_size, dtype=torch.int64)
        return outer, self.apply(aten.remainder.Scalar, merged, inner_size, dtype=torch.int64)

    def replace(self, value: Value, given: Mapping[Value, Value]) -> Value:
        """`value` with other values in place of some."""
        done: dict[Value, Value] = dict(given)
        for current in ordered(value):
            if current in done:
                continue
            if current.op is None or current.places.isdisjoint(given):
                done[current] = current
                continue
            args, kwargs = _changed(current, done)
            done[current] = self.apply(current.op, *args, dtype=current.dtype, is_scalar=current.is_scalar, **kwargs)
        return done[value]

    def _key(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            known = next((known for known in self._tensors if known is arg or _are_one(known, arg)), None)
            if known is None:
                self._tensors.append(arg)
            return id(arg if known is None else known)
        return id(arg) if isinstance(arg, Value) else (type(arg), repr(arg))


def _are_one(known: Tensor, other: Tensor) -> bool:
    """Whether two constants are the same to everybody who looks at them."""
    if known.dtype != other.dtype or known.shape != other.shape:
        return False
    return known.equal(other) and not known.is_complex() and bool((known.signbit() == other.signbit()).all())


def places_of(value: Value) -> frozenset[Value]:
    return frozenset([value]) if value.op is None else value.places


def ordered(value: Value) -> list[Value]:
    """Everything that `value` is made of, arguments before what is made of them."""
    found: dict[Value, None] = {}
    waiting = [value]
    while waiting:
        current = waiting[-1]
        missing = [arg for arg in current.inputs if arg not in found]
        waiting += missing
        if not missing:
            found[waiting.pop()] = None
    return list(found)


def compute(value: Value, known: dict[Value, Any], look_up_entry: Callable[..., Tensor] = look_up) -> Any:
    """`value` where some values, places among them, are `known`; what is found on the way joins those.

    Raises Refused where an op fails, or gives another dtype than it gave in the graph.
    """
    for current in _missing(value, known):
        assert current.op is not None, f"{current.name} is not bound"
        args, kwargs = _changed(current, known, _as_operand if current.op not in _OWN else lambda _, found: found)
        try:
            op = look_up_entry if current.op is look_up else current.op
            result = op(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            raise Refused(f"cannot be evaluated: {current.op}: {str(error).strip().splitlines()[0]}") from error
        if current.dtype is not None and getattr(result, "dtype", current.dtype) != current.dtype:
            raise Refused(f"cannot be asked: {current.op} gives {result.dtype} here and {current.dtype} in the graph")
        known[current] = result
    return known[value]


_OWN = (merge, number, look_up)


def _missing(value: Value, known: Mapping[Value, Any]) -> Iterator[Value]:
    waiting = [value]
    while waiting:
        current = waiting[-1]
        missing = [arg for arg in current.inputs if arg not in known] if current not in known else []
        waiting += missing
        if not missing:
            waiting.pop()
            if current not in known:
                yield current


def _changed(
    value: Value, known: Mapping[Value, Any], change: Callable[[Value, Any], Any] = lambda _, found: found
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of `value` with what is `known` in place of values."""

    def one(arg: Any) -> Any:
        return change(arg, known[arg]) if isinstance(arg, Value) else arg

    return [one(arg) for arg in value.args], {name: one(arg) for name, arg in value.kwargs.items()}


def _as_operand(value: Value, found: Any) -> Any:
    """`found` with dimensions or without, as in the graph: that decides which dtype a result has."""
    if not isinstance(found, Tensor):
        return found
    if value.is_scalar:
        return found.reshape(()) if found.numel() == 1 else found
    return found.reshape(1) if not found.dim() else found
