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
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.aliasing import mutated
from autodeploy.graph.along import (
    ADDED_CONTRACTIONS,
    BROADCASTS,
    FILLS,
    INDEX_ARGUMENTS,
    INDEXING,
    RESHAPES,
    arguments_of,
    einsum_labels,
    name_of,
    signature_of,
    worked_dims,
)
from autodeploy.graph.dependence import find_scalars
from autodeploy.graph.location import node_location
from autodeploy.graph.meta import VALUE
from autodeploy.graph.positions import counts_positions

_INPUTS = ("input_ids", "position_ids")


class Carries(IntEnum):
    """What the value of a node depends on, besides weights and constants."""

    NOTHING = 0  # the same for every token
    PLACES = 1  # where a token stands in its batch row, or how long the row is
    CHOICES = 2  # discrete: made from each token's activations alone
    COUNTS = 3  # made from the choices of many tokens: good as indices only
    TOKENS = 4  # ids, position_ids and activations


@dataclass
class Flow:
    """`mixing` and `places` list (node, why) in graph order.

    `mixing`: tokens are mixed outside attention. `places`: places in the row that the graph counted itself reach
    activations. `sorted` are the sorts over tokens, `stacked` those nodes whose token dimension, of c * B * S, holds c
    whole batches one after the other; in others it holds c values of each token next to each other. `positions` are
    nodes that count places along a row, or read a table at them, and are taken for what they are of a token: its
    position, and its entry.
    """

    attention: Collection[fx.Node]
    lengths: frozenset[Any]
    scalars: Collection[fx.Node]
    carries: dict[fx.Node, Carries] = field(default_factory=dict)
    mixing: list[tuple[fx.Node, str]] = field(default_factory=list)
    places: list[tuple[fx.Node, str]] = field(default_factory=list)
    token_dims: dict[int, list[int]] = field(default_factory=dict)
    sorted: set[fx.Node] = field(default_factory=set)
    stacked: set[fx.Node] = field(default_factory=set)
    positions: Collection[fx.Node] = ()


def token_flow(gm: fx.GraphModule, attention: Collection[fx.Node], *, takes_positions: bool = False) -> Flow:
    """What flows from token to token outside the nodes `attention`, which keep sequences apart.

    `gm` is a canonical graph of `input_ids` [B, S], not packed yet, whose nodes have their traced shapes. Raises
    UnsupportedFeature where its sizes are fixed, as nobody can tell then which dimensions hold tokens.
    """
    flow = Flow(attention, _sequence_lengths(gm), find_scalars(gm.graph))
    if takes_positions:
        written = mutated(gm.graph).values
        flow.positions = [node for node in gm.graph.nodes if counts_positions(node, flow.lengths, written)]
    for node in gm.graph.nodes:
        carries = _transfer(flow, node)
        flow.carries[node] = carries
        for written in _written(node):
            flow.carries[written] = max(carries, flow.carries.get(written, carries))
    return flow


def _sequence_lengths(gm: fx.GraphModule) -> frozenset[Any]:
    """The symbols for S: export may know an input's by a name of its own where nothing has compared the two."""
    found: set[Any] = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        shape = getattr(VALUE.get(node), "shape", ())
        # A length that something has been compared with may have become a number since.
        if len(shape) == 2 and _free_symbols(shape[1]) and (_expr(shape[0]) == 1 or _free_symbols(shape[0])):
            found |= _free_symbols(shape[1])
        elif node.name in _INPUTS and (node.users or node.name == _INPUTS[0]):
            raise UnsupportedFeature(
                f"a graph of fixed sizes, in which nobody can tell tokens from one another: {list(shape)}",
                where=node_location(node),
                fix="export it for every batch and length: dynamic_shapes={0: Dim.DYNAMIC, 1: Dim.DYNAMIC}",
            )
    return frozenset(found)


def _transfer(flow: Flow, node: fx.Node) -> Carries:
    if node.op == "placeholder" or node in flow.positions:
        return Carries.TOKENS
    if node.op in ("get_attr", "output"):
        return Carries.NOTHING
    if node in flow.scalars:
        is_known = VALUE.get(node) is not None and not _has_length(flow, VALUE.of(node))
        return Carries.NOTHING if is_known else Carries.PLACES
    values, indices = _operands(flow, node)
    if node.target is operator.getitem and node.args[0] in flow.sorted and node.args[1] == 1:
        return Carries.COUNTS  # which place each one had before
    if node in flow.attention or node.target is operator.getitem:
        return _discrete(node, values, _join(flow, node, [flow.carries[arg] for arg in values]))
    carried, picked = ([flow.carries[arg] for arg in args] for args in (values, indices))
    why = _why_mixes(flow, node, values, indices)
    if not _picks_tokens(flow, node):
        carried += picked
    elif not set(picked) <= {Carries.CHOICES, Carries.COUNTS}:
        why = why or "picks tokens by their place"
    elif max(carried) < Carries.CHOICES:
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
        if name_of(node) != "sort":
            return Carries.COUNTS
        flow.sorted.add(node)
        return carried
    return Carries.PLACES


def _discrete(node: fx.Node, values: Sequence[fx.Node], carried: Carries) -> Carries:
    if carried is not Carries.TOKENS or not any(_is_floating(arg) for arg in values) or _is_floating(node):
        return carried
    return Carries.CHOICES


def _is_floating(node: fx.Node) -> bool:
    return any(tensor.is_floating_point() for tensor in _tensors(node))


def _why_mixes(flow: Flow, node: fx.Node, values: Sequence[fx.Node], indices: Sequence[fx.Node]) -> str | None:
    """Why `node` may make one token's result from another token, or None where it does not."""
    if VALUE.get(node) is None:
        return None if _returns_nothing(node) else "has no recorded value and cannot be judged"
    inputs = [tensor for arg in [*values, *indices] for tensor in _tensors(arg)]
    results = [_token_dims(flow, tensor) for tensor in _tensors(node)]
    if not any(_token_dims(flow, tensor) for tensor in inputs):
        return "counts places" if any(results) and name_of(node) not in FILLS | BROADCASTS else None
    if any(free_unbacked_symbols(tensor) for tensor in _tensors(node)):
        return "has a size that is known only when it runs"
    if any(len(dims) > 1 for dims in [*results, *(_token_dims(flow, tensor) for tensor in inputs)]):
        return "relates tokens to one another"
    if not results or not all(results):
        return "reduces over tokens"
    if not all(_is_multiple(flow, tensor.shape[_token_dims(flow, tensor)[0]]) for tensor in _tensors(node)):
        return "cuts, pads or joins the sequence"
    source = inputs[1 if name_of(node) in ADDED_CONTRACTIONS else 0]
    if not _stacks_alike(flow, node, [*values, *indices], source):
        return "reshapes one token's values into another's"
    if name_of(node) == "repeat" and node in flow.stacked:
        return None
    if name_of(node) == "einsum":
        return _why_einsum_mixes(flow, node, inputs, _tensors(node)[0])
    worked = worked_dims(node, source, _tensors(node)[0])
    if worked is None:
        return f"calls {node.target}, which is not known to treat tokens alone"
    return "runs along the sequence" if set(worked) & set(_token_dims(flow, source)) else None


def _why_einsum_mixes(flow: Flow, node: fx.Node, inputs: Sequence[Tensor], result: Tensor) -> str | None:
    """Why an einsum mixes, unless the tokens of every factor have the label that they have in the result."""
    labels = einsum_labels(arguments_of(node)["equation"])
    if labels is None:
        return "is an einsum whose labels are not all written out"
    factors, results = labels
    (wanted,) = [results[dim] for dim in _token_dims(flow, result)]
    carried = {labels[dim] for labels, factor in zip(factors, inputs, strict=True) for dim in _token_dims(flow, factor)}
    return None if carried == {wanted} else "runs along the sequence"


def _picks_tokens(flow: Flow, node: fx.Node) -> bool:
    """Whether the indices of `node` choose among tokens."""
    arguments = arguments_of(node)
    source = next((tensor for arg in node.all_input_nodes[:1] for tensor in _tensors(arg)), None)
    dims = _token_dims(flow, source) if source is not None else []
    if "offs" in arguments:
        return bool(dims)
    if name_of(node) not in INDEXING or source is None:
        return False
    if name_of(node) == "embedding":
        return 0 in dims
    if "dim" in arguments:
        return arguments["dim"] % source.dim() in dims
    return any(index is not None and dim in dims for dim, index in enumerate(arguments["indices"]))


def _operands(flow: Flow, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes whose values `node` reads: as numbers, and as indices. Sizes and shapes to follow are neither."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.all_input_nodes), []
    values: list[fx.Node] = []
    indices: list[fx.Node] = []
    arguments = arguments_of(node)
    for name in signature_of(node.target).read:
        found: list[fx.Node] = []
        fx.map_arg(arguments.get(name), found.append)
        if name in INDEX_ARGUMENTS:
            indices += found
        else:
            values += found
    if name_of(node) in FILLS:
        values = [arg for arg in values if arg in flow.scalars]
    return values[:1] if name_of(node).endswith("_as") else values, indices


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


def _returns_nothing(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def _tensors(node: fx.Node) -> list[Tensor]:
    value = VALUE.get(node)
    return [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, Tensor)]


def _token_dims(flow: Flow, tensor: Tensor) -> list[int]:
    if id(tensor) not in flow.token_dims:  # the nodes keep their tensors alive
        flow.token_dims[id(tensor)] = [dim for dim, size in enumerate(tensor.shape) if _has_length(flow, size)]
    return flow.token_dims[id(tensor)]


def _free_symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, SymInt) else set()


def _has_length(flow: Flow, size: Any) -> bool:
    if not isinstance(size, SymInt | SymFloat | SymBool):
        return False
    return not flow.lengths.isdisjoint(_symbols(size.node.expr))


def _is_multiple(flow: Flow, size: Any) -> bool:
    """Whether the SymInt `size` is a length times something without it, which no cut or padded length is."""
    return any(flow.lengths.isdisjoint(_symbols(_expr(size), length)) for length in flow.lengths)


def _stacks_alike(flow: Flow, node: fx.Node, operands: Sequence[fx.Node], source: Tensor) -> bool:
    """Whether tokens lie in one way in all operands of `node`; notes those of its results that are stacked."""
    counted = [arg for arg in operands if any(_copies(flow, tensor) != 1 for tensor in _tensors(arg))]
    stacked = [arg for arg in counted if arg in flow.stacked]
    result = _tensors(node)[0]
    if len(stacked) not in (0, len(counted)) or (stacked and name_of(node) in INDEXING):
        return False
    is_stacked = bool(stacked)
    if name_of(node) == "repeat":
        (dim,) = _token_dims(flow, source)
        times = arguments_of(node)["repeats"][dim - source.dim()]
        is_stacked = is_stacked or (times != 1 and _copies(flow, source) == 1)
    elif name_of(node) in RESHAPES:
        distance = _distance(flow, source, is_stacked)
        is_stacked = distance != _distance(flow, result, False)
        if is_stacked and distance != _distance(flow, result, True):
            return False
    if is_stacked and _copies(flow, result) != 1:
        flow.stacked.add(node)
    return True


def _copies(flow: Flow, tensor: Tensor) -> Any:
    """How many values of each token the token dimension of `tensor` holds; 1 where it has none."""
    dims = _token_dims(flow, tensor)
    return _expr(tensor.shape[dims[0]]).as_coeff_Mul()[0] if dims else 1


def _distance(flow: Flow, tensor: Tensor, is_stacked: bool) -> Any:
    """How many values lie between a token's and the next one's in `tensor`: not those of whole copies of the batch."""
    (dim,) = _token_dims(flow, tensor)
    inner = math.prod(_expr(size) for size in tensor.shape[dim + 1 :])
    return inner if is_stacked else _copies(flow, tensor) * inner


@cache
def _symbols(expr: Any, divisor: Any = 1) -> frozenset[Any]:
    """The symbols of a sympy expression over another; a graph has few, on many nodes."""
    return frozenset((expr / divisor).free_symbols)


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size
