"""Which nodes of a traced graph carry tokens, and where one token's value reaches another's outside attention.

A forward dataflow over the recorded shapes, before the inputs are packed. The sequence's length is a symbol, so a
dimension holds tokens when that symbol is in its size. An op treats tokens alone when each result has exactly one such
dimension, a plain multiple of the length, and the op itself does not run along it. An op that is not known is refused.

Routing to experts is allowed: integers and booleans read off activations may be sorted, counted and summed over the
tokens as long as the results are used as indices only. Not seen, and trusted: that tokens permuted by such indices are
put back in order before they meet others.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx

from autodeploy.dependence import find_scalars


class Carries(IntEnum):
    """What the value of a node depends on, besides weights and constants."""

    NOTHING = 0  # the same for every token
    PLACES = 1  # where a token stands in its batch row, or how long the row is
    CHOICES = 2  # discrete: made from each token's activations alone
    COUNTS = 3  # made from the choices of many tokens: good as indices only
    TOKENS = 4  # ids, position_ids and activations


_FILLS = {f"{name}{suffix}" for name in ("full", "zeros", "ones", "empty") for suffix in ("", "_like")}
_FILLS |= {"new_full", "new_zeros", "new_ones", "new_empty", "scalar_tensor"}
_BROADCASTS = {"expand", "expand_as", "repeat"}
# Not pointwise, but the shape of the result says all.
_RESHAPES = {"view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"}
_VIEWS = _RESHAPES | {
    "squeeze",
    "unsqueeze",
    "transpose",
    "permute",
    "t",
    "slice",
    "select",
    "narrow",
    "unbind",
    "stack",
    "repeat_interleave",
}
_COPIES = {"to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "copy", "dropout"}
_ROWWISE = {"embedding", "one_hot", "layer_norm", "rms_norm"}
_INDEXING = {"index", "index_select", "gather", "index_put", "scatter", "scatter_add", "index_add"}
_JUDGED_BY_SHAPE = _FILLS | _BROADCASTS | _VIEWS | _COPIES | _ROWWISE | _INDEXING
_CONTRACTIONS = {"linear", "matmul", "mm", "bmm", "_grouped_mm", "grouped_mm_fallback"}
_ADDED_CONTRACTIONS = {"addmm", "baddbmm"}
# Pointwise ops, aliases mostly, that torch has not tagged so in every overload.
_UNTAGGED = {
    "where",
    "masked_fill",
    "multiply",
    "divide",
    "true_divide",
    "floor_divide",
    "subtract",
    "rsub",
    "negative",
}
_UNTAGGED |= {"absolute", "less", "less_equal", "greater", "greater_equal", "not_equal", "__and__", "__or__", "__xor__"}
_UNTAGGED |= {"hardswish", "log_sigmoid", "special_expit", "prelu"}
_INDEX_ARGUMENTS = ("index", "indices", "offs")


@dataclass
class Flow:
    """`mixing` and `places` list (node, why) in graph order.

    `mixing`: tokens are mixed outside attention. `places`: places in the row that the graph counted itself reach
    activations. Both are empty for a graph without a symbolic sequence length, which cannot be judged.
    """

    attention: Collection[fx.Node]
    lengths: frozenset[Any]
    scalars: Collection[fx.Node]
    carries: dict[fx.Node, Carries] = field(default_factory=dict)
    mixing: list[tuple[fx.Node, str]] = field(default_factory=list)
    places: list[tuple[fx.Node, str]] = field(default_factory=list)
    token_dims: dict[int, list[int]] = field(default_factory=dict)


def token_flow(gm: fx.GraphModule, attention: Collection[fx.Node]) -> Flow:
    """What flows from token to token outside the nodes `attention`, which keep sequences apart.

    `gm` is a canonical graph of `input_ids` [B, S], not packed yet, whose nodes have their traced shapes.
    """
    flow = Flow(attention, _sequence_lengths(gm), find_scalars(gm.graph))
    for node in gm.graph.nodes if flow.lengths else ():
        carries = _transfer(flow, node)
        flow.carries[node] = carries
        for written in _written(node):
            flow.carries[written] = max(carries, flow.carries.get(written, carries))
    return flow


def _sequence_lengths(gm: fx.GraphModule) -> frozenset[Any]:
    """The symbols for S: export may know an input's by a name of its own where nothing has compared the two."""
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in gm.graph.find_nodes(op="placeholder")]
    sizes = [shape[1] for shape in shapes if len(shape) == 2]
    return frozenset(symbol for size in sizes if isinstance(size, SymInt) for symbol in size.node.expr.free_symbols)


def _transfer(flow: Flow, node: fx.Node) -> Carries:
    if node.op == "placeholder":
        return Carries.TOKENS
    if node.op in ("get_attr", "output"):
        return Carries.NOTHING
    if node in flow.scalars:
        return Carries.PLACES if _has_length(flow, node.meta.get("val")) else Carries.NOTHING
    values, indices = _operands(flow, node)
    if node in flow.attention or node.target is operator.getitem:
        return _discrete(node, values, _join(flow, node, [flow.carries[arg] for arg in values]))
    carried, picked = ([flow.carries[arg] for arg in args] for args in (values, indices))
    why = _why_mixes(flow, node, values, indices)
    if not _picks_tokens(flow, node):
        carried += picked
    elif not set(picked) <= {Carries.CHOICES, Carries.COUNTS}:
        why = why or "picks tokens by their place"
    elif Carries.TOKENS not in carried:
        carried += picked
    return _discrete(node, values, _mixed(flow, node, _join(flow, node, carried), why))


def _join(flow: Flow, node: fx.Node, carried: Iterable[Carries]) -> Carries:
    """What a function of values that carry `carried` carries."""
    kinds = {Carries.NOTHING, *carried}
    if Carries.TOKENS in kinds and Carries.PLACES in kinds:
        flow.places.append((node, "uses places in the sequence, or its length, that the model counted itself"))
    if Carries.TOKENS in kinds and Carries.COUNTS in kinds:
        flow.mixing.append((node, "uses a count over the tokens"))
    return Carries.COUNTS if max(kinds) is Carries.CHOICES and Carries.PLACES in kinds else max(kinds)


def _mixed(flow: Flow, node: fx.Node, carried: Carries, why: str | None) -> Carries:
    """What `node` carries, given what its operands do and why it mixes them, if it does."""
    if why is not None and carried is Carries.TOKENS:
        flow.mixing.append((node, why))
    if why is None or carried in (Carries.TOKENS, Carries.COUNTS):
        return carried
    if carried is Carries.CHOICES:
        return carried if _name(node) in ("sort", "argsort") else Carries.COUNTS
    return Carries.PLACES


def _discrete(node: fx.Node, values: Sequence[fx.Node], carried: Carries) -> Carries:
    if carried is not Carries.TOKENS or not any(_is_floating(arg) for arg in values) or _is_floating(node):
        return carried
    return Carries.CHOICES


def _is_floating(node: fx.Node) -> bool:
    return any(tensor.is_floating_point() for tensor in _tensors(node))


def _why_mixes(flow: Flow, node: fx.Node, values: Sequence[fx.Node], indices: Sequence[fx.Node]) -> str | None:
    """Why `node` may make one token's result from another token, or None where it does not."""
    if node.meta.get("val") is None:
        return None
    inputs = [tensor for arg in [*values, *indices] for tensor in _tensors(arg)]
    results = [_token_dims(flow, tensor) for tensor in _tensors(node)]
    if not any(_token_dims(flow, tensor) for tensor in inputs):
        return "counts places" if any(results) and _name(node) not in _FILLS | _BROADCASTS else None
    if any(len(dims) > 1 for dims in [*results, *(_token_dims(flow, tensor) for tensor in inputs)]):
        return "relates tokens to one another"
    if not results or not all(results):
        return "reduces over tokens"
    if not all(_is_multiple(flow, tensor.shape[_token_dims(flow, tensor)[0]]) for tensor in _tensors(node)):
        return "cuts, pads or joins the sequence"
    source = inputs[1 if _name(node) in _ADDED_CONTRACTIONS else 0]
    if _name(node) in _RESHAPES and _distance(flow, source) != _distance(flow, _tensors(node)[0]):
        return "reshapes one token's values into another's"
    worked = _worked_dims(node, source.dim())
    if worked is None:
        return f"calls {node.target}, which is not known to treat tokens alone"
    return "runs along the sequence" if set(worked) & set(_token_dims(flow, source)) else None


def _worked_dims(node: fx.Node, ndim: int) -> Sequence[int] | None:
    """The dimensions of its first factor that `node` does not treat entry by entry; None where that is not known."""
    name, arguments = _name(node), _arguments(node)
    if name == "repeat":
        return [dim - len(arguments["repeats"]) + ndim for dim, times in enumerate(arguments["repeats"]) if times != 1]
    if name in _JUDGED_BY_SHAPE | _UNTAGGED:
        return ()
    if name in _CONTRACTIONS | _ADDED_CONTRACTIONS:
        return (ndim - 1,)
    if name == "einsum":
        return _einsum_dims(arguments["equation"])
    if name in ("constant_pad_nd", "pad"):
        return [ndim - 1 - index // 2 for index, amount in enumerate(arguments["pad"]) if amount != 0]
    if name.startswith("conv"):
        return range(1, ndim)
    if dims := [key for key in ("dim", "dims") if key in arguments]:
        given = arguments[dims[0]]
        given = [given] if isinstance(given, int) else given
        return [dim % ndim for dim in given or range(ndim)]
    is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return () if is_pointwise else None


def _einsum_dims(equation: str) -> Sequence[int] | None:
    """All dimensions of the first factor but those that every factor and the result have."""
    factors, _, result = equation.replace(" ", "").partition("->")
    if "." in factors or not result:
        return None
    common = set(result).intersection(*factors.split(","))
    return [dim for dim, label in enumerate(factors.split(",")[0]) if label not in common]


def _picks_tokens(flow: Flow, node: fx.Node) -> bool:
    """Whether the indices of `node` choose among tokens."""
    arguments = _arguments(node)
    source = next((tensor for arg in node.all_input_nodes[:1] for tensor in _tensors(arg)), None)
    dims = _token_dims(flow, source) if source is not None else []
    if "offs" in arguments:
        return bool(dims)
    if _name(node) not in _INDEXING or source is None:
        return False
    if "dim" in arguments:
        return arguments["dim"] % source.dim() in dims
    return any(index is not None and dim in dims for dim, index in enumerate(arguments["indices"]))


def _operands(flow: Flow, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes whose values `node` reads: as numbers, and as indices. Sizes and shapes to follow are neither."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.all_input_nodes), []
    values: list[fx.Node] = []
    indices: list[fx.Node] = []
    arguments = _arguments(node)
    for name in _signature(node.target).read:
        found: list[fx.Node] = []
        fx.map_arg(arguments.get(name), found.append)
        if name in _INDEX_ARGUMENTS:
            indices += found
        else:
            values += found
    if _name(node) in _FILLS:
        values = [arg for arg in values if arg in flow.scalars]
    return values[:1] if _name(node).endswith("_as") else values, indices


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of `node` by name, defaults included; empty where its target has no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    signature = _signature(node.target)
    return signature.defaults | dict(zip(signature.names, node.args, strict=False)) | node.kwargs


class _Signature(NamedTuple):
    """An op's arguments: all in order, those read as numbers or indices, and the defaults of those that have one."""

    names: list[str]
    read: list[str]
    defaults: dict[str, Any]


@cache
def _signature(op: torch._ops.OpOverload) -> _Signature:
    arguments = op._schema.arguments
    kinds = {argument.name: str(argument.type) for argument in arguments}
    return _Signature(
        names=list(kinds),
        read=[
            name
            for name, kind in kinds.items()
            if name in _INDEX_ARGUMENTS or any(word in kind for word in ("Tensor", "number", "float"))
        ],
        defaults={argument.name: argument.default_value for argument in arguments if argument.has_default_value()},
    )


def _name(node: fx.Node) -> str:
    """The op's name without namespace and overload, in-place ops under their plain name."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = node.target._schema.name.split("::")[-1]
    return name if name.endswith("__") else name.removesuffix("_")


def _written(node: fx.Node) -> set[fx.Node]:
    """Everything that shares storage with what `node` writes to."""
    found: set[fx.Node] = set()
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return found
    waiting = [node]
    while waiting:
        alias = waiting.pop()
        if alias in found:
            continue
        found.add(alias)
        waiting += [user for user in alias.users if _is_view(user)]
        waiting += alias.all_input_nodes[:1] if _is_view(alias) else []
    return found


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(value.alias_info for value in target._schema.returns)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, Tensor)]


def _token_dims(flow: Flow, tensor: Tensor) -> list[int]:
    if id(tensor) not in flow.token_dims:  # the nodes keep their tensors alive
        flow.token_dims[id(tensor)] = [dim for dim, size in enumerate(tensor.shape) if _has_length(flow, size)]
    return flow.token_dims[id(tensor)]


def _has_length(flow: Flow, size: Any) -> bool:
    if not isinstance(size, SymInt | SymFloat | SymBool):
        return False
    return not flow.lengths.isdisjoint(_symbols(size.node.expr))


def _is_multiple(flow: Flow, size: Any) -> bool:
    """Whether the SymInt `size` is a length times something without it, which no cut or padded length is."""
    return any(flow.lengths.isdisjoint(_symbols(_expr(size), length)) for length in flow.lengths)


def _distance(flow: Flow, tensor: Tensor) -> Any:
    """How many values lie between a token's and the next one's in `tensor`.

    A dimension of c * B * S holds c values of each token next to each other: those of B are whole rows.
    """
    (dim,) = _token_dims(flow, tensor)
    return _expr(tensor.shape[dim]).as_coeff_Mul()[0] * math.prod(_expr(size) for size in tensor.shape[dim + 1 :])


@cache
def _symbols(expr: Any, divisor: Any = 1) -> frozenset[Any]:
    """The symbols of a sympy expression over another; a graph has few, on many nodes."""
    return frozenset((expr / divisor).free_symbols)


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size
