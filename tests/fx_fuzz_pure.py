"""Productions of random graphs that neither write, nor draw random numbers, nor have effects."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from fx_fuzz_root import ATTRIBUTES, COLUMNS, ops
from torch import fx

if TYPE_CHECKING:
    from fx_fuzz import Production, Scope

aten, hop = torch.ops.aten, torch.ops.higher_order
_MAX = 9223372036854775807
_DTYPES = (torch.float32, torch.int64, torch.float64, torch.bool)
_LITERALS = (1, 1.0, True, 2, 0.0, -0.0, float("nan"), float("inf"))
_INDICES: tuple[Any, ...] = (
    0,
    -1,
    slice(None, 2),
    slice(None, None, 2),
    None,
    Ellipsis,
    (slice(None), None, 0),
    (Ellipsis, slice(1, None)),
    [0, 2],
    (0, 2),
    (Ellipsis, [1, 0]),
)


def _dtype(s: Scope) -> torch.dtype:
    return _DTYPES[s.n % 4]


def _index(s: Scope) -> Any:
    return _INDICES[s.n % len(_INDICES)]


def _binary(s: Scope) -> fx.Node:
    """y as 0 and 1, to look rows up with."""
    return s.call(aten._to_copy.default, s.call(aten.gt.Scalar, s.y, 0), dtype=torch.int64)


def _rows(s: Scope) -> fx.Node:
    """Row numbers within the first dimension of x."""
    size = s.call(aten.sym_size.int, s.x, 0)
    return s.call(aten.arange.start_step, 0, size, 1 + s.n % 2)


ATEN: dict[str, Production] = {
    "add": lambda s: s.call(aten.add.Tensor, s.x, s.y),
    "add by name": lambda s: s.call(aten.add.Tensor, s.x, other=s.y, alpha=1 + s.n % 2),
    "add all by name": lambda s: s.call(aten.add.Tensor, other=s.y, self=s.x),
    "add a literal": lambda s: s.call(aten.add.Tensor, s.x, _LITERALS[s.n % 8]),
    "add.Scalar": lambda s: s.call(aten.add.Scalar, s.x, _LITERALS[s.n % 8]),
    "mul by a size": lambda s: s.call(aten.mul.Tensor, s.x, s.k),
    "sub": lambda s: s.call(aten.sub.Tensor, s.x, s.y),
    "atan2": lambda s: s.call(aten.atan2.default, s.x, s.y),
    "floor_divide": lambda s: s.call(aten.div.Tensor_mode, s.x, 2, rounding_mode=(None, "floor", "trunc")[s.n % 3]),
    "maximum": lambda s: s.call(aten.maximum.default, s.x, s.y),
    "neg": lambda s: s.call(aten.neg.default, s.x),
    "where": lambda s: s.call(aten.where.self, s.call(aten.gt.Scalar, s.x, s.n % 3), s.x, s.y),
    "clamp": lambda s: s.call(aten.clamp.default, s.x, None if s.n % 2 else 0, s.n % 3 or None),
    "masked_fill": lambda s: s.call(aten.masked_fill.Scalar, s.x, s.call(aten.le.Scalar, s.y, 0), -1),
    "cumsum": lambda s: s.call(aten.cumsum.default, s.x, s.n % 2),
    "cumsum dtype": lambda s: s.call(aten.cumsum.default, s.x, 0, dtype=(None, torch.float64)[s.n % 2]),
    "sum": lambda s: s.call(aten.sum.dim_IntList, s.x, [s.n % 2], bool(s.n & 4)),
    "amax": lambda s: s.call(aten.amax.default, s.x, [-1], True),
    "any": lambda s: s.call(aten.any.dim, s.x, 0),
    "tril": lambda s: s.call(aten.tril.default, s.x, s.n % 3 - 1),
    "gather": lambda s: s.call(aten.gather.default, s.x, 0, s.call(aten.zeros_like.default, s.y, dtype=torch.int64)),
    "index": lambda s: s.call(aten.index.Tensor, s.x, [_rows(s)]),
    "index after None": lambda s: s.call(aten.index.Tensor, s.x, [None, s.call(aten.arange.default, 2 + s.n % 2)]),
    "index_put": lambda s: s.call(aten.index_put.default, s.x, [_rows(s)], s.attribute("scalar"), bool(s.n & 4)),
    "scatter": lambda s: s.call(aten.scatter.value, s.x, 0, s.call(aten.zeros_like.default, s.y, dtype=torch.int64), 3),
    "embedding": lambda s: s.call(aten.embedding.default, s.x, _binary(s)),
    "searchsorted": lambda s: s.call(aten.searchsorted.Tensor, s.attribute("buffer"), s.x, right=bool(s.n % 2)),
    "cat": lambda s: s.call(aten.cat.default, [s.x, s.y, s.x][: 2 + s.n % 2], 0),
    "stack": lambda s: s.call(aten.stack.default, [s.x, s.y], s.n % 2),
    "clone": lambda s: s.call(aten.clone.default, s.x),
    "clone contiguous": lambda s: s.call(aten.clone.default, s.x, memory_format=torch.contiguous_format),
    "_to_copy": lambda s: s.call(aten._to_copy.default, s.x, dtype=_dtype(s)),
    "matmul": lambda s: s.call(aten.mm.default, s.x, s.call(aten.t.default, s.y)),
    "empty and fill": lambda s: s.call(aten.fill.Scalar, s.call(aten.empty.memory_format, [s.k, COLUMNS]), s.n),
    "scalar_tensor": lambda s: s.call(aten.scalar_tensor.default, _LITERALS[s.n % 8], dtype=_dtype(s)),
}

VIEWS: dict[str, Production] = {
    "view": lambda s: s.call(aten.view.default, s.x, [-1]),
    "reshape": lambda s: s.call(aten.reshape.default, s.x, [-1, (1, 2, 3)[s.n % 3]]),
    "transpose": lambda s: s.call(aten.transpose.int, s.x, 0, -1),
    "twice transposed": lambda s: s.call(aten.t.default, s.call(aten.t.default, s.x)),
    "select": lambda s: s.call(aten.select.int, s.x, s.n % 2, s.n % 3),
    "slice": lambda s: s.call(aten.slice.Tensor, s.x, s.n % 2, s.n % 3, _MAX),
    "slice to a size": lambda s: s.call(aten.slice.Tensor, s.x, 0, 0, s.k),
    "expand": lambda s: s.call(aten.expand.default, s.call(aten.unsqueeze.default, s.x, 0), [2, *[-1] * s.rank(s.x)]),
    "expand to a size": lambda s: s.call(aten.expand.default, s.attribute("buffer"), [s.k, COLUMNS]),
    "as_strided": lambda s: s.call(aten.as_strided.default, s.x, [2, 3], [1, 1], s.n % 2),
    "diagonal": lambda s: s.call(aten.diagonal.default, s.x),
    "squeeze": lambda s: s.call(aten.squeeze.default, s.x),
    "unsqueeze": lambda s: s.call(aten.unsqueeze.default, s.x, s.n % 2),
    "detach": lambda s: s.call(aten.detach.default, s.x),
    "alias": lambda s: s.call(aten.alias.default, s.x),
    "to, perhaps itself": lambda s: s.call(aten.to.dtype, s.x, _dtype(s)),
    "contiguous, perhaps itself": lambda s: s.call(aten.contiguous.default, s.x),
    "unfold": lambda s: s.call(aten.unfold.default, s.x, 0, 2, 1),
    "view_as_real": lambda s: s.call(aten.view_as_real.default, s.call(aten.complex.default, s.x, s.x)),
}

LISTS: dict[str, Production] = {
    "split": lambda s: s.call(aten.split.Tensor, s.x, 2 + s.n % 2, s.n % 2),
    "split by sizes": lambda s: s.call(aten.split_with_sizes.default, s.x, [1, COLUMNS - 1], -1),
    "unbind": lambda s: s.call(aten.unbind.int, s.x, s.n % 2),
    "chunk": lambda s: s.call(aten.chunk.default, s.x, 2, s.n % 2),
    "meshgrid": lambda s: s.call(
        torch.meshgrid, s.call(torch.ravel, s.attribute("buffer")), s.attribute("twin"), indexing="ij"
    ),
    "topk": lambda s: s.call(aten.topk.default, s.x, 2),
    "sort": lambda s: s.call(aten.sort.stable, s.x, stable=True, dim=-1),
    "torch.max": lambda s: s.call(torch.max, s.x, 0),
    "var_mean": lambda s: s.call(aten.var_mean.correction, s.x, [0], correction=0),
    "method split": lambda s: s.method("split", s.x, 3, -1),
    "method max": lambda s: s.method("max", s.x, dim=0),
    "size": lambda s: s.method("size", s.x),
    "shape": lambda s: s.call(getattr, s.x, "shape"),
    "broadcast_tensors": lambda s: s.call(torch.broadcast_tensors, s.x, s.y),
    "custom pair": lambda s: s.call(ops.pair.default, s.x),
    "custom parts": lambda s: s.call(ops.parts.default, s.x),
}

SIZES: dict[str, Production] = {
    "sym_size": lambda s: s.call(aten.sym_size.int, s.x, s.n % 2),
    "sym_numel": lambda s: s.call(aten.sym_numel.default, s.x),
    "method size": lambda s: s.method("size", s.x, 0),
    "shape[0]": lambda s: s.call(operator.getitem, s.call(getattr, s.x, "shape"), 0),
    "size plus": lambda s: s.call(operator.add, s.k, s.n),
    "size times": lambda s: s.call(operator.mul, 2, s.k),
    "size floordiv": lambda s: s.call(operator.floordiv, s.k, 1 + s.n % 3),
    "sym_max": lambda s: s.call(torch.sym_max, s.k, 1 + s.n % 5),
    "sym_min": lambda s: s.call(torch.sym_min, s.k, 1 + s.n % 5),
}

FACTORIES: dict[str, Production] = {
    "arange": lambda s: s.call(aten.arange.default, s.k),
    "arange dtype": lambda s: s.call(aten.arange.default, s.k, dtype=torch.int64),
    "arange device": lambda s: s.call(aten.arange.default, s.k, device=torch.device("cpu"), pin_memory=False),
    "arange start": lambda s: s.call(aten.arange.start, 0, s.k, dtype=(None, torch.float32)[s.n % 2]),
    "full": lambda s: s.call(aten.full.default, [s.k, COLUMNS], _LITERALS[s.n % 8]),
    "full dtype": lambda s: s.call(aten.full.default, [s.k, COLUMNS], _LITERALS[s.n % 8], dtype=_dtype(s)),
    "zeros": lambda s: s.call(aten.zeros.default, [s.k, COLUMNS]),
    "zeros dtype": lambda s: s.call(aten.zeros.default, [s.k, COLUMNS], dtype=torch.float32, device="cpu"),
    "full_like": lambda s: s.call(aten.full_like.default, s.x, _LITERALS[s.n % 8]),
    "zeros_like": lambda s: s.call(aten.zeros_like.default, s.x, dtype=_dtype(s)),
    "torch.arange": lambda s: s.call(torch.arange, s.k),
    "torch.arange device": lambda s: s.call(torch.arange, 0, s.k, device="cpu"),
    "torch.zeros": lambda s: s.call(torch.zeros, s.k, COLUMNS),
    "torch.zeros tuple": lambda s: s.call(torch.zeros, (s.k, COLUMNS), dtype=_dtype(s)),
    "torch.full": lambda s: s.call(torch.full, (s.k, COLUMNS), fill_value=_LITERALS[s.n % 8]),
    "new_zeros": lambda s: s.method("new_zeros", s.x, s.k, COLUMNS),
    "new_full": lambda s: s.call(aten.new_full.default, s.x, [COLUMNS], s.n),
}

TORCH: dict[str, Production] = {
    "torch.add": lambda s: s.call(torch.add, s.x, s.y),
    "torch.add by name": lambda s: s.call(torch.add, input=s.x, other=s.y, alpha=1 + s.n % 2),
    "torch.where": lambda s: s.call(torch.where, s.call(torch.gt, s.x, 0), s.x, s.y),
    "F.pad": lambda s: s.call(F.pad, s.x, (0, s.n % 2, 1, 0), value=_LITERALS[s.n % 8]),
    "F.relu": lambda s: s.call(F.relu, s.x, inplace=False),
    "F.softmax": lambda s: s.call(F.softmax, s.x, dim=-1, dtype=(None, torch.float64)[s.n % 2]),
    "torch.einsum": lambda s: s.call(torch.einsum, "i...,i...->...", s.x, s.y),
    "op packet": lambda s: s.call(aten.add, s.x, s.y),
    "torch.transpose": lambda s: s.call(torch.transpose, s.x, 0, -1),
    "torch.atleast_2d": lambda s: s.call(torch.atleast_2d, s.x),
    "custom op": lambda s: s.call(ops.opaque.default, s.x, *[s.n % 3][: s.n % 2]),
}

METHODS: dict[str, Production] = {
    "clamp method": lambda s: s.method("clamp", s.x, min=0),
    "to method": lambda s: s.method("to", s.x, _dtype(s)),
    "to with a dtype node": lambda s: s.method("to", s.x, dtype=s.call(getattr, s.y, "dtype")),
    "float": lambda s: s.method(("float", "long", "double", "bool")[s.n % 4], s.x),
    "view method": lambda s: s.method("view", s.x, -1, 1 + s.n % 3),
    "expand method": lambda s: s.method("expand", s.x, 2, *[-1] * s.rank(s.x)),
    "masked_fill method": lambda s: s.method("masked_fill", s.x, s.call(operator.gt, s.y, 0), s.n),
    "sum method": lambda s: s.method("sum", s.x, -1, keepdim=True),
    "type_as": lambda s: s.method("type_as", s.x, s.y),
    "T": lambda s: s.call(getattr, s.x, ("T", "data", "real")[s.n % 3]),
}

OPERATORS: dict[str, Production] = {
    "x + y": lambda s: s.call(operator.add, s.x, s.y),
    "x - literal": lambda s: s.call(operator.sub, s.x, _LITERALS[s.n % 8]),
    "x * size": lambda s: s.call(operator.mul, s.x, s.k),
    "-x": lambda s: s.call(operator.neg, s.x),
    "x > y": lambda s: s.call(operator.gt, s.x, s.y),
    "x[...]": lambda s: s.call(operator.getitem, s.x, _index(s)),
    "x[:size]": lambda s: s.call(operator.getitem, s.x, (slice(None, s.k), None)),
    "x[rows]": lambda s: s.call(operator.getitem, s.x, _rows(s)),
}

HIGHER_ORDER: dict[str, Production] = {
    "auto_functionalized": lambda s: s.call(hop.auto_functionalized, ops.bump.default, x=s.x, n=s.n),
    "auto_functionalized_v2": lambda s: s.call(
        hop.auto_functionalized_v2, ops.bump.default, n=s.n % 2, _x_base_index=0, _all_bases=[s.x]
    ),
    "cond": lambda s: s.call(hop.cond, s.call(aten.gt.Scalar, s.call(aten.sum.default, s.y), 0), *_bodies(s), (s.x,)),
    "map": lambda s: s.call(hop.map_impl, s.attribute("times_row"), [s.x], [s.attribute("buffer")]),
}


def _bodies(s: Scope) -> list[fx.Node]:
    """Graphs for both branches: under one name or two, equal or not."""
    return [s.attribute(name) for name in (("twice", "twice_again")[s.n % 2], "less")]


# Their results may be what they are given, or a view of it: a pass without recorded values cannot tell.
PERHAPS_ITSELF = {
    *HIGHER_ORDER,
    "to, perhaps itself",
    "contiguous, perhaps itself",
    "reshape",
    "torch.einsum",
    "torch.atleast_2d",
    "broadcast_tensors",
    "meshgrid",
    "to method",
    "to with a dtype node",
    "float",
    "type_as",
    "x[...]",
    "x[rows]",
    "F.pad",
}

ATTRIBUTE: dict[str, Production] = {"get_attr": lambda s: s.attribute(ATTRIBUTES[s.n % len(ATTRIBUTES)])}

PURE = {
    name: production
    for group in (
        ATEN,
        VIEWS,
        LISTS,
        SIZES,
        FACTORIES,
        TORCH,
        METHODS,
        OPERATORS,
        HIGHER_ORDER,
        ATTRIBUTE,
    )
    for name, production in group.items()
}
