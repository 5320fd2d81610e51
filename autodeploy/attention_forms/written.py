"""What an entry is of a tensor that was written into: in functionalised graphs a copy with some entries changed.

mask = zeros([S, S])                                  entry(i, j) = where(i < j, -inf, 0)
mask = index_put(mask, [less], -inf)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.places import Value, aten
from autodeploy.attention_forms.unfolder import Places, Unfolder
from autodeploy.graph.along import arguments_of
from autodeploy.graph.meta import VALUE


def mask_of_put(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """The bool tensor, broadcast to the tensor written to, and what is written where it is true; None where another."""
    arguments = arguments_of(node)
    indices, values = arguments["indices"], arguments["values"]
    chosen = [index for index in indices if index is not None]
    if len(chosen) != 1 or arguments["accumulate"] or indices[-1] is not chosen[0]:
        return None
    mask, recorded = VALUE.of(chosen[0]), VALUE.of(node)
    covers = mask.dtype is torch.bool and len(indices) - 1 + mask.dim() == recorded.dim()
    is_one = statically_known_true(VALUE.of(values).numel() == 1)
    return (chosen[0], values) if covers and is_one else None


def is_whole(node: fx.Node) -> bool:
    """Whether a slice_scatter writes to all entries."""
    return statically_known_true(sym_eq([*VALUE.of(node).shape], [*VALUE.of(node.args[1]).shape]))  # type: ignore[arg-type]


def put(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    found = mask_of_put(node)
    if found is None:
        raise Refused("cannot be asked: it is written to at places that were computed")
    mask, values = found
    dtype = VALUE.of(node).dtype
    new = unfold.cast(unfold(values, [0] * VALUE.of(values).dim()), dtype)
    old = unfold(arguments["self"], places)
    return unfold.values.apply(aten.where.self, unfold(mask, places), new, old, dtype=dtype)


def slice_scatter(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    if is_whole(node):
        return unfold(arguments["src"], places)
    values, dtype = unfold.values, VALUE.of(node).dtype
    dim = arguments["dim"] % len(places)
    start, end = (unfold.static(arguments[name] or 0) for name in ("start", "end"))
    if arguments["step"] != 1 or start < 0 or end < 0:
        raise Refused("cannot be asked: it is written to at places counted from its end")
    place = unfold.as_value(places[dim])
    begins = values.apply(aten.ge.Scalar, place, start, dtype=torch.bool)
    ends = values.apply(aten.lt.Scalar, place, end, dtype=torch.bool)
    inside = values.apply(aten.logical_and.default, begins, ends, dtype=torch.bool)
    source = values.apply(aten.clamp.default, unfold.shifted(place, -start), 0, end - start - 1, dtype=torch.int64)
    new = unfold(arguments["src"], [*places[:dim], source, *places[dim + 1 :]])
    return values.apply(aten.where.self, inside, new, unfold(arguments["self"], places), dtype=dtype)


def fill(unfold: Unfolder, node: fx.Node, arguments: dict[str, Any], places: Places) -> Value:
    recorded, value = VALUE.of(node), arguments["value"]
    if isinstance(value, fx.Node) and isinstance(VALUE.of(value), torch.Tensor):
        return unfold.cast(unfold(value, ()), recorded.dtype)
    entry = torch.full((1,) if recorded.dim() else (), unfold.static(value), dtype=recorded.dtype)
    return unfold.values.constant(entry, *([0] if recorded.dim() else []))
