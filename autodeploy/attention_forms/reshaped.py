"""Where the entries of a reshaped tensor lie in the tensor that it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.places import Values


def reshaped(values: Values, places: Sequence[Any], after: Sequence[Any], before: Sequence[Any]) -> tuple[Any, ...]:
    """One place per size in `before`, for an entry at `places` of the view whose sizes are `after`."""
    result: list[Any] = [0] * len(before)
    new = [dim for dim, size in enumerate(after) if not _is(size, 1)]
    old = [dim for dim, size in enumerate(before) if not _is(size, 1)]
    while new and old:
        new_dims, old_dims = _group(new, old, after, before)
        place = places[new_dims[0]]
        for dim in new_dims[1:]:
            place = values.merged(place, places[dim], _known(after[dim]))
        for dim in reversed(old_dims[1:]):
            place, result[dim] = values.parts(place, _known(before[dim]))
        result[old_dims[0]] = place
    if new or old:
        raise Refused("cannot be asked: a view's sizes cannot be matched")
    return tuple(result)


def _group(new: list[int], old: list[int], after: Sequence[Any], before: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The last dimensions of both, taken off the lists, that hold equally many entries."""
    new_dims, old_dims = [new.pop()], [old.pop()]
    while not _is(_product(after, new_dims), _product(before, old_dims)):
        sizes = _product(after, new_dims), _product(before, old_dims)
        # The side without the symbol, or the smaller one, has to grow.
        grows_new = isinstance(sizes[0], int) and (not isinstance(sizes[1], int) or sizes[0] < sizes[1])
        side, dims = (new, new_dims) if grows_new else (old, old_dims)
        if not side:
            raise Refused("cannot be asked: a view's sizes cannot be matched")
        dims.insert(0, side.pop())
    return new_dims, old_dims


def _product(sizes: Sequence[Any], dims: Sequence[int]) -> Any:
    return math.prod(sizes[dim] for dim in dims)


def _known(size: Any) -> int:
    if not isinstance(size, int):
        raise Refused(f"cannot be asked: a view splits or joins a dimension of {size}")
    return size


def _is(size: Any, other: Any) -> bool:
    return statically_known_true(size == other)
