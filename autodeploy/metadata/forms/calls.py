"""What an integer op computes, however Dynamo, export or AOTAutograd spell it: one reader per op.

A reader is a plain function with the arguments that torch, ATen and the tensor method have in common, so that Python
binds positions, names and defaults. It returns what the call means, or None for what it does not know.
`torch.fx.operator_schemas.normalize_function` knows neither methods nor operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from autodeploy.metadata.fields import NAMESPACE


class Call(NamedTuple):
    """An op by its canonical name; `args` are nodes, meanings of nodes (Calls), ints, dtypes and tuples of those."""

    op: str
    args: tuple[Any, ...]


Reader = Callable[..., "Call | None"]
_readers: dict[Any, Reader] = {}
_METHODS = frozenset(["call_function", "call_method"])
_TO_END = 2**63 - 1  # how ATen writes the end of an open slice


def read(node: fx.Node) -> Call | None:
    """What `node` computes, None where no reader knows it."""
    if node.op not in _METHODS:
        return None
    reader = _readers.get(node.target)
    if reader is None:
        return None
    kwargs = node.kwargs
    if "self" in kwargs:
        kwargs = {"input" if name == "self" else name: value for name, value in kwargs.items()}
    try:
        return reader(*node.args, **kwargs)
    except TypeError:  # arguments that no spelling read here has, such as those of where(condition)
        return None


def is_int(value: Any) -> bool:
    """Whether a literal is an integer; True and 1.0 are not."""
    return type(value) is int


def reads(name: str, *targets: Any) -> Callable[[Reader], Reader]:
    """Register a reader for all that is called `name` in torch, in ATen and among the tensor methods, and `targets`."""

    def register(reader: Reader) -> Reader:
        packet = getattr(torch.ops.aten, name)
        overloads = [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
        for target in (*targets, name, *overloads, *filter(None, [getattr(torch, name, None)])):
            _readers[target] = reader
        return reader

    return register


def _sum(x: Any, y: Any) -> Call | None:
    x, y = (x, y) if isinstance(x, fx.Node) else (y, x)
    return Call("add", (x, y)) if isinstance(x, fx.Node) and (isinstance(y, fx.Node) or is_int(y)) else None


@reads("add", operator.add)
def _add(input: Any, other: Any, *, alpha: int = 1) -> Call | None:
    return _sum(input, other) if alpha == 1 else None


@reads("sub", operator.sub)
def _sub(input: Any, other: Any, *, alpha: int = 1) -> Call | None:
    if alpha != 1 or not isinstance(input, fx.Node):
        return None
    return Call("sub", (input, other)) if isinstance(other, fx.Node) else _sum(input, -other)


@reads("neg", operator.neg)
def _neg(input: Any) -> Call:
    return Call("neg", (input,))


def _by_int(op: str, x: Any, divisor: Any) -> Call | None:
    return Call(op, (x, divisor)) if isinstance(x, fx.Node) and is_int(divisor) and divisor > 0 else None


@reads("remainder", operator.mod)
def _remainder(input: Any, other: Any) -> Call | None:
    return _by_int("remainder", input, other)


@reads("floor_divide", operator.floordiv)
def _floor_divide(input: Any, other: Any) -> Call | None:
    return _by_int("floor_divide", input, other)


@reads("div")
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Call | None:
    return _by_int("floor_divide", input, other) if rounding_mode == "floor" else None


@reads("eq", operator.eq)
def _eq(input: Any, other: Any) -> Call | None:
    return Call("eq", (input, other)) if is_int(other) else None


@reads("ne", operator.ne)
def _ne(input: Any, other: Any) -> Call | None:
    return Call("ne", (input, other)) if is_int(other) else None


@reads("gt", operator.gt)
def _gt(input: Any, other: Any) -> Call | None:
    return Call("gt", (input, other)) if is_int(other) else None


def _where(condition: Any, input: Any, other: Any) -> Call:
    return Call("where", (condition, input, other))


# The method's first argument is not the condition.
_readers |= dict.fromkeys(
    [torch.where, *(getattr(torch.ops.aten.where, name) for name in torch.ops.aten.where.overloads())], _where
)


@reads("masked_fill")
def _masked_fill(input: Any, mask: Any, value: Any) -> Call:
    return Call("where", (mask, value, input))


@reads("clamp")
def _clamp(input: Any, min: Any = None, max: Any = None) -> Call | None:
    return Call("clamp_max", (input, max)) if min is None and max is not None else None


@reads("clamp_max")
def _clamp_max(input: Any, max: Any) -> Call:
    return Call("clamp_max", (input, max))


def _filled(value: Any, size: Any) -> Call | None:
    """`size` is a tuple, or None where it is that of another tensor."""
    return Call("full", (value, size)) if is_int(value) else None


@reads("full")
def _full(size: Any, fill_value: Any, **_: Any) -> Call | None:
    return _filled(fill_value, tuple(size))


@reads("scalar_tensor")
def _scalar_tensor(s: Any, **_: Any) -> Call | None:
    return _filled(s, ())


@reads("full_like")
def _full_like(input: Any, fill_value: Any, **_: Any) -> Call | None:
    return _filled(fill_value, None)


@reads("zeros")
def _zeros(*size: Any, **_: Any) -> Call | None:
    return _filled(0, tuple(size[0]) if isinstance(size[0], list | tuple) else size)


@reads("new_zeros")
def _new_zeros(input: Any, *size: Any, **_: Any) -> Call | None:
    return _zeros(*size)


@reads("to")
def _to(input: Any, dtype: Any) -> Call | None:
    return Call("convert", (input, dtype)) if isinstance(dtype, torch.dtype) else None


@reads("_to_copy", torch.ops.prims.convert_element_type.default)
def _to_copy(input: Any, dtype: Any = None) -> Call | None:
    return _to(input, dtype)


_readers["long"] = lambda input: Call("convert", (input, torch.int64))
_readers["int"] = lambda input: Call("convert", (input, torch.int32))


@reads("cumsum")
def _cumsum(input: Any, dim: int, *, dtype: torch.dtype | None = None) -> Call | None:
    return Call("cumsum", (input, dtype)) if dim in (0, -1) else None


@reads("pad", torch.nn.functional.pad, torch._C._nn.pad)  # pyright: ignore[reportAttributeAccessIssue]
def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Call | None:
    return Call("pad", (input,)) if tuple(pad) == (1, 0) and mode == "constant" and not value else None


@reads("constant_pad_nd")
def _constant_pad_nd(input: Any, pad: Any, value: float = 0) -> Call | None:
    return _pad(input, pad, value=value)


@reads("cat")
def _cat(tensors: Any, dim: int = 0) -> Call | None:
    return Call("cat", tuple(tensors)) if dim in (0, -1) and len(tensors) == 2 else None


@reads("slice_scatter")
def _slice_scatter(
    input: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Call | None:
    return Call("slice_scatter", (input, src)) if (dim, start, end, step) == (0, 1, _TO_END, 1) else None


@reads("copy")
def _copy(input: Any, src: Any) -> Call:
    return Call("copy", (input, src))


def _sliced(x: Any, start: Any, end: Any) -> Call:
    return Call("slice", (x, 0 if start is None else start, None if end == _TO_END else end))


@reads("slice")
def _slice(input: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Call | None:
    return _sliced(input, start, end) if dim in (0, -1) and step == 1 else None


def _column(x: Any, index: Any) -> Call | None:
    return Call("column", (x, index)) if is_int(index) else None


@reads("select")
def _select(input: Any, dim: int, index: Any) -> Call | None:
    return _column(input, index) if dim in (1, -1) else None


def _getitem(x: Any, index: Any) -> Call | None:
    if isinstance(index, slice):
        return _sliced(x, index.start, index.stop) if index.step in (None, 1) else None
    if isinstance(index, fx.Node):
        return Call("index", (x, index))
    if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None):
        return _column(x, index[1])
    return None


_readers[operator.getitem] = _getitem


@reads("index")
def _index(input: Any, indices: Any) -> Call | None:
    return Call("index", (input, indices[0])) if len(indices) == 1 else None


@reads("index_select")
def _index_select(input: Any, dim: int, index: Any) -> Call | None:
    return Call("index", (input, index)) if dim in (0, -1) else None


@reads("diff")
def _diff(input: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Call | None:
    plain = n == 1 and dim in (0, -1) and prepend is None and append is None
    return Call("diff", (input,)) if plain else None


@reads("arange")
def _arange(*bounds: Any, end: Any = None, start: Any = 0, step: Any = 1, **_: Any) -> Call | None:
    if bounds:
        start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    whole = isinstance(end, fx.Node) or is_int(end)
    return Call("arange", (end,)) if whole and is_int(start) and is_int(step) and (start, step) == (0, 1) else None


def _iota(length: Any, *, start: Any, step: Any, **_: Any) -> Call | None:
    return _arange(start, length, step)


_readers[torch.ops.prims.iota.default] = _iota


@reads("repeat_interleave")
def _repeat_interleave(input: Any, repeats: Any = None, dim: Any = None, *, output_size: Any = None) -> Call | None:
    """`repeat_interleave(repeats)` alone repeats 0, 1, 2, ...; "rows" is that, "repeat" is of a tensor."""
    if repeats is None:
        return Call("rows", (input, output_size))
    return Call("repeat", (input, repeats, output_size)) if dim in (None, 0, -1) else None


@reads("searchsorted")
def _searchsorted(
    sorted_sequence: Any, input: Any, *, out_int32: bool = False, right: bool = False, side: str | None = None
) -> Call | None:
    """The number of entries that are at most `input`."""
    return Call("count_upto", (sorted_sequence, input)) if side == "right" or (right and side is None) else None


@reads("bucketize")
def _bucketize(input: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False) -> Call | None:
    return Call("count_upto", (boundaries, input)) if right else None


_LENGTHS = ("query_lens", "context_lens", "seq_lens")
for _name in _LENGTHS:
    _readers[getattr(getattr(torch.ops, NAMESPACE), _name).default] = lambda layout, name=_name: Call(
        "length", (name, layout)
    )
_readers[getattr(torch.ops, NAMESPACE).cu_seqlens_q.default] = lambda layout: Call(
    "prefix_sum", (Call("length", ("query_lens", layout)),)
)
