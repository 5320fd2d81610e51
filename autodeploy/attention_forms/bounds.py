"""How small and how large a value can be over a block of places, from how small and large its arguments can be.

Every op here is monotone in each argument while the others stand still, rounding included, so that its extremes lie at
the arguments' own; a few others have a rule of their own. Of what is left nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from autodeploy.attention_forms.places import Value

_SUMS = {"add", "sub", "subtract", "rsub"}
_PRODUCTS = {"mul", "multiply"}
_QUOTIENTS = {"div", "divide", "true_divide", "floor_divide"}
_COMPARISONS = {"lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"}
_LIMITS = {"minimum", "maximum", "clamp", "clamp_min", "clamp_max"}
_CHOICES = {"where", "masked_fill"}
_STEPS = {"neg", "negative", "floor", "ceil", "trunc", "round", "relu", "__rshift__", "bitwise_right_shift"}
_LOGIC = {"logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and", "bitwise_or", "bitwise_xor"}
_LOGIC |= {"bitwise_not", "__and__", "__or__", "__xor__"}
_MONOTONE = _SUMS | _PRODUCTS | _QUOTIENTS | _COMPARISONS | _LIMITS | _CHOICES | _STEPS | _LOGIC | {"to"}


@dataclass(frozen=True)
class Bounds:
    """`low` and `high` [N] of a value over N blocks, where `known` [N]; they mean nothing elsewhere."""

    low: Tensor
    high: Tensor
    known: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor) -> Bounds:
        is_nan = low.isnan() | high.isnan() if low.is_floating_point() else torch.zeros_like(low, dtype=torch.bool)
        return cls(low, high, ~is_nan)

    @classmethod
    def unknown(cls, num_blocks: int, dtype: torch.dtype) -> Bounds:
        nothing = torch.zeros(num_blocks, dtype=dtype)
        return cls(nothing, nothing, torch.zeros(num_blocks, dtype=torch.bool))


Rule = Callable[[Value, str, Sequence[Any]], Bounds]


def bounds_of(value: Value, args: Sequence[Any], num_blocks: int) -> Bounds:
    """The bounds of `value`, where `args` are its arguments: bounds, or what is the same in every block."""
    name = value.word
    given = [arg for arg in args if isinstance(arg, Bounds)]
    assert value.dtype is not None
    rule = _rule(name, value.dtype, given)
    if rule is None or value.dtype.is_complex or any(isinstance(arg, Value) for arg in value.kwargs.values()):
        return Bounds.unknown(num_blocks, value.dtype)
    known = torch.stack([each.known.expand(num_blocks) for each in given]).all(0)
    found = rule(value, name, args)
    return Bounds(found.low.expand(num_blocks), found.high.expand(num_blocks), found.known.expand(num_blocks) & known)


def _rule(
    name: str, dtype: torch.dtype, given: Sequence[Bounds]
) -> Callable[[Value, str, Sequence[Any]], Bounds] | None:
    if name in ("eq", "ne", "not_equal"):
        return _equality
    if name in ("abs", "absolute"):
        return _distance
    if name in ("remainder", "__mod__"):
        return _remainder
    if name in _LOGIC and any(each.low.dtype is not torch.bool for each in given):
        return None
    if name == "to" and dtype is torch.bool:
        return _is_not_zero
    return _at_corners if name in _MONOTONE or name == "merge" else None


def _at_corners(value: Value, name: str, args: Sequence[Any]) -> Bounds:
    corners = [_call(value, corner) for corner in product(*(_ends(arg) for arg in args))]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = torch.minimum(low, corner), torch.maximum(high, corner)
    found = Bounds.of(low, high)
    return Bounds(low, high, found.known & _is_safe(value, name, args))


def _ends(arg: Any) -> tuple[Any, ...]:
    return (arg.low, arg.high) if isinstance(arg, Bounds) else (arg,)


def _call(value: Value, args: Sequence[Any]) -> Tensor:
    """`value.op` of one corner; [1] or [N]."""
    shaped = []
    for old, new in zip(value.args, args, strict=True):
        is_scalar = isinstance(old, Value) and old.is_scalar and new.numel() == 1
        shaped.append(new.reshape(()) if is_scalar else new)
    assert value.op is not None
    return torch.as_tensor(value.op(*shaped, **value.kwargs)).reshape(-1)


def _is_safe(value: Value, name: str, args: Sequence[Any]) -> Tensor:
    """Where nothing can happen between the corners: no overflow, no division by zero, no NaN."""
    given = [arg for arg in args if isinstance(arg, Bounds)]
    assert value.dtype is not None
    if name in _QUOTIENTS and isinstance(args[1], Bounds):
        return (args[1].low > 0) | (args[1].high < 0)
    if name == "to" and given[0].low.is_floating_point() and not value.dtype.is_floating_point:
        return (given[0].low > -(2.0**62)) & (given[0].high < 2.0**62)
    if name not in _SUMS | _PRODUCTS | {"neg", "negative", "merge"}:
        return torch.ones((), dtype=torch.bool)
    if value.dtype.is_floating_point:
        return _is_never_nan(name, given)
    numbers = [arg for arg in (*args, *value.kwargs.values()) if isinstance(arg, int | float)]
    sizes = [torch.maximum(each.low.double().abs(), each.high.double().abs()) for each in given]
    sizes = torch.broadcast_tensors(*sizes, *(torch.tensor(abs(float(number))) for number in numbers))
    # The alpha of a sum and the size of a merge are factors.
    is_sum = name in _SUMS and not value.kwargs
    largest = torch.stack(sizes).sum(0) if is_sum else 2 * torch.stack(sizes).clamp_min(1).prod(0)
    return largest < torch.iinfo(value.dtype).max


def _is_never_nan(name: str, given: Sequence[Bounds]) -> Tensor:
    """No infinity that another one, or a zero, could meet."""
    floats = [each for each in given if each.low.is_floating_point()]
    infinite = [torch.isinf(each.low) | torch.isinf(each.high) for each in floats]
    total = sum((each.long() for each in infinite), torch.zeros((), dtype=torch.int64))
    return total <= int(name in _SUMS or len(given) == 1)


def _equality(value: Value, name: str, args: Sequence[Any]) -> Bounds:
    one, other = (_interval(arg) for arg in args[:2])
    is_same = (one[0] == one[1]) & (other[0] == other[1]) & (one[0] == other[0])
    is_apart = (one[1] < other[0]) | (other[1] < one[0])
    low, high = (is_same, ~is_apart) if name == "eq" else (is_apart, ~is_same)
    low, high = low.reshape(-1), high.reshape(-1)
    return Bounds(low, high, torch.ones_like(low))


def _interval(arg: Any) -> tuple[Tensor, Tensor]:
    """As numbers that are compared as eq compares them: bools and integers below 2^53, or floats."""
    ends = _ends(arg)
    low, high = (torch.as_tensor(end) for end in (ends[0], ends[-1]))
    if low.dtype is torch.bool:
        return low.long(), high.long()
    return low, high


def _is_not_zero(value: Value, name: str, args: Sequence[Any]) -> Bounds:
    return _equality(value, "ne", (args[0], 0))


def _distance(value: Value, name: str, args: Sequence[Any]) -> Bounds:
    low, high = args[0].low, args[0].high
    straddles = (low < 0) & (high > 0)
    at_ends = low.abs(), high.abs()
    smallest = torch.where(straddles, torch.zeros_like(low), torch.minimum(*at_ends))
    return Bounds(smallest, torch.maximum(*at_ends), torch.ones_like(low, dtype=torch.bool))


def _remainder(value: Value, name: str, args: Sequence[Any]) -> Bounds:
    dividend, divisor = args
    if (
        not isinstance(dividend, Bounds)
        or isinstance(divisor, Bounds)
        or divisor <= 0
        or dividend.low.is_floating_point()
    ):
        assert value.dtype is not None
        return Bounds.unknown(1, value.dtype)
    is_one_turn = dividend.low // divisor == dividend.high // divisor
    low = torch.where(is_one_turn, dividend.low % divisor, 0).to(value.dtype)
    high = torch.where(is_one_turn, dividend.high % divisor, divisor - 1).to(value.dtype)
    return Bounds(low, high, torch.ones_like(low, dtype=torch.bool))
