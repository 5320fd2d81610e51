"""Rules of pages: rounded-up division and what is left in the last page, for positive literal divisors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy.metadata.forms.calls import Call, is_int
from autodeploy.metadata.forms.values import INTEGERS, Values


class LastPageLen:
    """where(s % p == 0, p, s % p) == (s - 1) % p + 1 with floored remainders, for p > 0 and all s, 0 and negative too.

    With r = s % p: if r > 0, (s - 1) % p = r - 1; if r = 0, (s - 1) % p = p - 1. Where s - 1 overflows, at the least
    integer of the dtype, this needs that p divides 2^n; a length is never there.
    """

    roots: ClassVar[tuple[str, ...]] = ("where", "add")

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        if call.op == "where":
            return _match_where(values, call)
        remainder = values.meaning(call.args[0])
        if not is_int(call.args[1]) or call.args[1] != 1 or remainder.op != "remainder":
            return None
        before, page_size = values.meaning(remainder.args[0]), remainder.args[1]
        return Call("last_page_len", (before.args[0], page_size)) if adds(before, -1) else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        lengths, page_size = form.args
        if page_size & (page_size - 1) and not isinstance(lengths, Call):
            return f"is (s - 1) % p + 1 only where s - 1 does not overflow, as {page_size} is no power of two"
        if not values.same_shape(node, lengths):
            return "is the last page's length, but in another shape"
        return _check_dtype(values, node, lengths, page_size)


def _match_where(values: Values, call: Call) -> Call | None:
    condition, if_true, if_false = call.args
    test = values.meaning(condition)
    if test.op not in ("eq", "ne", "gt") or test.args[1] != 0:
        return None
    full, rest = (if_true, if_false) if test.op == "eq" else (if_false, if_true)
    remainder = values.meaning(rest)
    if rest is not test.args[0] or remainder.op != "remainder":
        return None
    return Call("last_page_len", remainder.args) if values.constant(full) == remainder.args[1] else None


class CeilDiv:
    """(x + p - 1) // p, with floored division however it is written."""

    roots: ClassVar[tuple[str, ...]] = ("floor_divide",)

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        raised, divisor = values.meaning(call.args[0]), call.args[1]
        return Call("ceil_div", (raised.args[0], divisor)) if adds(raised, divisor - 1) else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        return _check_dtype(values, node, *form.args)


class NegatedFloorDiv:
    """-(-x // p) == (x + p - 1) // p, where neither -x nor x + p - 1 overflows: for lengths."""

    roots: ClassVar[tuple[str, ...]] = ("neg",)

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        division = values.meaning(call.args[0])
        negated = values.meaning(division.args[0])
        matches = division.op == "floor_divide" and negated.op == "neg"
        return Call("ceil_div", (negated.args[0], division.args[1])) if matches else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        if not isinstance(form.args[0], Call):
            return "is a division rounded up, which adding p - 1 before it is too only where neither overflows"
        return _check_dtype(values, node, *form.args)


def adds(meaning: Call, number: int) -> bool:
    """Whether a value is another plus that literal."""
    return meaning.op == "add" and is_int(meaning.args[1]) and meaning.args[1] == number


def _check_dtype(values: Values, node: fx.Node, numbers: Any, divisor: int) -> str | None:
    dtype = values.dtype(node)
    if dtype not in INTEGERS or dtype != values.dtype(numbers):
        return "is not known to have the signed integer dtype of what is divided"
    return None if divisor <= torch.iinfo(dtype).max else f"divides by {divisor}, which {dtype} does not hold"
