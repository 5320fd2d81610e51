"""The ops that treat places one by one: what an entry of their result is, given entries of their arguments.

What mixes places has no rule: a flip, a maximum, a sum over the sequence make an entry depend on the sequence's length.
So what is unfolded holds for every length at once. Tables stay tables, and running sums become tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.attention_forms import written
from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.places import Value, Values, aten, compute, places_of
from autodeploy.attention_forms.reshaped import reshaped
from autodeploy.attention_forms.unfolder import Places, Rule, Unfolder, base_name, is_one
from autodeploy.graph.meta import VALUE


def unfolder(
    gm: fx.GraphModule,
    known: set[fx.Node],
    values: Values,
    length: Any,
    longest: int,
    *,
    same_lengths: set[Any] | frozenset[Any] = frozenset(),
    inputs: Mapping[fx.Node, Value] | None = None,
) -> Unfolder:
    """An Unfolder that knows all the rules of this file."""
    return Unfolder(gm, known, values, length, longest, same_lengths, _rule, inputs)


def _rule(node: fx.Node) -> Rule | None:
    name = base_name(node)
    return _RULES.get(name) or (_pointwise if _is_pointwise(node, name) else None)


def _is_pointwise(node: fx.Node, name: str) -> bool:
    target = node.target
    return name in _POINTWISE or (
        bool(name) and isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    )


def _pointwise(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    recorded = VALUE.of(node)

    def operand(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return unfold(arg, places) if isinstance(VALUE.get(arg), Tensor) else unfold.number(arg)
        return arg

    args = [operand(arg) for arg in node.args]
    kwargs = {name: operand(arg) for name, arg in node.kwargs.items()}
    op: Any = node.target
    is_idle = base_name(node) in ("add", "sub") and type(args[1]) is int and args[1] == 0
    if is_idle and isinstance(args[0], Value) and args[0].dtype == recorded.dtype and recorded.dim():
        return args[0]
    return unfold.values.apply(op, *args, dtype=recorded.dtype, is_scalar=not recorded.dim(), **kwargs)


def _arange(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    dtype = VALUE.of(node).dtype
    start, step = unfold.number(arguments.get("start", 0)), unfold.static(arguments.get("step", 1))
    if not dtype.is_floating_point:
        return unfold.cast(unfold.as_value(unfold.shifted(places[0], start, step)), dtype)
    # ATen counts in float64, too, and rounds at the end.
    place = unfold.cast(unfold.as_value(places[0]), torch.float64)
    scaled = unfold.values.apply(aten.mul.Tensor, place, step, dtype=torch.float64)
    return unfold.cast(unfold.values.apply(aten.add.Tensor, scaled, start, dtype=torch.float64), dtype)


def _fill(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    name = base_name(node)
    filled = (
        int("ones" in name) if "ones" in name or "zeros" in name else arguments.get("fill_value", arguments.get("s"))
    )
    recorded = VALUE.of(node)
    entry = torch.full((1,) if recorded.dim() else (), unfold.static(filled), dtype=recorded.dtype)
    return unfold.values.constant(entry, *([0] if recorded.dim() else []))


def _same(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    return unfold(node.all_input_nodes[0], places)


def _cast(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    return unfold.cast(unfold(node.all_input_nodes[0], places), VALUE.of(node).dtype)


def _reshape(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    source = node.all_input_nodes[0]
    sizes = VALUE.of(node).shape, VALUE.of(source).shape
    return unfold(source, reshaped(unfold.values, places, *sizes))


def _permute(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    ndim = len(places)
    order = list(arguments.get("dims", range(ndim)))
    if "dims" not in arguments:
        one, other = arguments.get("dim0", -1), arguments.get("dim1", -2)
        order[one], order[other] = order[other], order[one]
    inner: list[Any] = [0] * ndim
    for dim, before in enumerate(order):
        inner[before] = places[dim]
    return unfold(node.all_input_nodes[0], inner)


def _select(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    source = node.all_input_nodes[0]
    sizes = VALUE.of(source).shape
    dim, index = arguments["dim"] % len(sizes), unfold.static(arguments["index"])
    index = index if index >= 0 else index + unfold.static(sizes[dim])
    return unfold(source, [*places[:dim], index, *places[dim:]])


def _slice(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    source = node.all_input_nodes[0]
    sizes = VALUE.of(source).shape
    dim = arguments["dim"] % len(sizes)
    start = unfold.start(arguments["start"] or 0, sizes[dim])
    if isinstance(start, int) and start < 0:
        start = max(0, start + unfold.static(sizes[dim]))
    place = unfold.shifted(places[dim], start, unfold.static(arguments.get("step", 1)))
    return unfold(source, [*places[:dim], place, *places[dim + 1 :]])


def _repeat(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    source = node.all_input_nodes[0]
    sizes = VALUE.of(source).shape
    inner = list(places[len(places) - len(sizes) :])
    for dim, times in enumerate(arguments["repeats"][len(places) - len(sizes) :]):
        if not (isinstance(times, int) and times == 1) and not is_one(sizes[dim]):
            inner[dim] = unfold.values.parts(inner[dim], unfold.static(sizes[dim]))[1]
    return unfold(source, inner)


def _repeat_interleave(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    dim = arguments["dim"] if arguments["dim"] is not None or len(places) > 1 else 0
    if dim is None or not isinstance(arguments.get("repeats"), int):
        raise Refused("cannot be asked: repeats that are not one number")
    inner = list(places)
    inner[dim] = unfold.values.parts(places[dim], arguments["repeats"])[0]
    return unfold(node.all_input_nodes[0], inner)


def _triangle(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    values, dtype = unfold.values, VALUE.of(node).dtype
    row, column = map(unfold.as_value, places[-2:])
    distance = values.apply(aten.sub.Tensor, column, row, dtype=torch.int64)
    compare = aten.le.Scalar if base_name(node) == "tril" else aten.ge.Scalar
    kept = values.apply(compare, distance, unfold.number(arguments["diagonal"]), dtype=torch.bool)
    zero = values.constant(torch.zeros((), dtype=dtype))
    return values.apply(aten.where.self, kept, unfold(node.all_input_nodes[0], places), zero, dtype=dtype)


def _cumsum(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    values, source = unfold.values, node.all_input_nodes[0]
    dim = arguments["dim"] % max(1, len(places))
    summed = unfold(source, [*places[:dim], values.query, *places[dim + 1 :]])
    if not places_of(summed) <= {values.query}:
        raise Refused("cannot be asked: a sum along the sequence that differs from row to row")
    row_L = compute(summed, {values.query: torch.arange(unfold.longest)}).expand(unfold.longest)
    sums_L = aten.cumsum.default(row_L, 0, dtype=VALUE.of(node).dtype)
    return values.apply(within, sums_L, places[dim], dtype=sums_L.dtype)


def within(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table that was made up to the largest position, and means nothing beyond."""
    if bool(((index < 0) | (index >= len(table))).any()):
        raise Refused("cannot be asked: it reads a running sum beyond the largest position")
    return table[index]


def _cat(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    return _joined(unfold, arguments["tensors"], arguments["dim"] % len(places), places, VALUE.of(node).dtype)


def _joined(unfold: Unfolder, pieces: Sequence[fx.Node], dim: int, places: Places, dtype: torch.dtype) -> Value:
    """An entry of `pieces`, one after another along `dim`."""
    first, *rest = pieces
    if not rest:
        return unfold.cast(unfold(first, places), dtype)
    size, place = unfold.static(VALUE.of(first).shape[dim]), places[dim]

    def entry(of: Sequence[fx.Node], at: Any) -> Value:
        return _joined(unfold, of, dim, [*places[:dim], at, *places[dim + 1 :]], dtype)

    if isinstance(place, int):
        return entry([first], place) if place < size else entry(rest, place - size)
    values = unfold.values
    is_first = values.apply(aten.lt.Scalar, place, size, dtype=torch.bool)
    inside = values.apply(aten.clamp_max.default, place, size - 1, dtype=torch.int64)
    beyond = values.apply(aten.clamp_min.default, unfold.shifted(place, -size), 0, dtype=torch.int64)
    return values.apply(aten.where.self, is_first, entry([first], inside), entry(rest, beyond), dtype=dtype)


def _diff(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    dtype, dim = VALUE.of(node).dtype, arguments["dim"] % len(places)
    if arguments["n"] != 1 or arguments["append"] is not None or dtype is torch.bool:
        raise Refused("cannot be asked: a difference of differences, or of bools")
    pieces = [arg for arg in (arguments["prepend"], arguments["self"]) if arg is not None]
    before, after = (
        _joined(unfold, pieces, dim, [*places[:dim], unfold.shifted(places[dim], by), *places[dim + 1 :]], dtype)
        for by in (0, 1)
    )
    return unfold.values.apply(aten.sub.Tensor, after, before, dtype=dtype)


def _index(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    source = arguments["self"]
    ndim, indices = VALUE.of(source).dim(), arguments["indices"]
    chosen = [dim for dim, index in enumerate(indices) if index is not None]
    num_common = max(VALUE.of(indices[dim]).dim() for dim in chosen)
    is_together = chosen == list(range(chosen[0], chosen[-1] + 1))
    start = chosen[0] if is_together else 0
    common = places[start : start + num_common]
    others = iter([*places[:start], *places[start + num_common :]])
    inner = []
    for dim in range(ndim):
        if dim not in chosen:
            inner.append(next(others))
        elif VALUE.of(indices[dim]).dtype in (torch.bool, torch.uint8):
            raise Refused("cannot be asked: it is chosen by a mask")
        else:
            inner.append(unfold(indices[dim], common))
    return _entry(unfold, source, inner)


def _embedding(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    return _entry(unfold, arguments["weight"], [unfold(arguments["indices"], places[:-1]), places[-1]])


def _gather(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    inner = list(places)
    inner[arguments["dim"]] = unfold(arguments["index"], places)
    return _entry(unfold, arguments["self"], inner)


def _index_select(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    inner = list(places)
    inner[arguments["dim"]] = unfold(arguments["index"], [places[arguments["dim"]]])
    return _entry(unfold, arguments["self"], inner)


def _entry(unfold: Unfolder, source: fx.Node, places: Places) -> Value:
    """An entry of `source` at places that were computed."""
    if unfold.is_constant(source):
        return unfold.values.constant(unfold.constant(source), *places)
    if all(isinstance(place, int) or place.op is None for place in places):
        return unfold(source, places)
    raise Refused("cannot be asked: it picks positions by what it computed")


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor", "zeros", "zeros_like", "new_zeros"), _fill),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _fill),
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh"), _same),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _same),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("flatten", "unflatten"), _reshape),
    **dict.fromkeys(("permute", "transpose", "t", "mT"), _permute),
    **dict.fromkeys(("tril", "triu"), _triangle),
    "fill": written.fill,
    "index_put": written.put,
    "slice_scatter": written.slice_scatter,
    "arange": _arange,
    "select": _select,
    "slice": _slice,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "cumsum": _cumsum,
    "cat": _cat,
    "diff": _diff,
    "index": _index,
    "embedding": _embedding,
    "gather": _gather,
    "index_select": _index_select,
}
# Pointwise, though torch has not tagged every overload so.
_POINTWISE = {"where", "masked_fill", "multiply", "divide", "true_divide", "floor_divide", "subtract", "rsub"}
_POINTWISE |= {"negative", "absolute", "less", "less_equal", "greater", "greater_equal", "not_equal"}
_POINTWISE |= {"__and__", "__or__", "__xor__", "__lshift__", "__rshift__"}
