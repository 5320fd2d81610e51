"""The rule of token rows: which sequence each packed token belongs to."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy.metadata.forms.calls import Call
from autodeploy.metadata.forms.values import INTEGERS, Values, is_size


class TokenRow:
    """repeat_interleave(arange(S), q, output_size=T) == searchsorted([0, cumsum q], arange(T), right=True) - 1.

    Repeating is defined where no q is negative and T = sum q, the search where the sums are sorted. There, token t is
    in row r iff sum(q[:r]) <= t < sum(q[:r + 1]), and r is the number of entries of cumsum(q) up to t. With padding,
    T > sum q, the search gives S for it: then only a search clamped to S - 1 is the field token_to_seq.
    """

    roots: ClassVar[tuple[str, ...]] = ("repeat", "rows", "count_upto", "add", "index", "clamp_max", "convert")

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        first = values.meaning(call.args[0])
        if call.op == "repeat":
            _, lengths, num_tokens = call.args
            is_range = first.op == "arange" and is_size(values.number(first.args[0]), values.length(lengths))
            return _repeated(values.unwidened(lengths), num_tokens) if is_range else None
        if call.op == "rows":
            return _repeated(values.unwidened(call.args[0]), call.args[1])
        if call.op == "count_upto":
            return _match_search(values, first, call)
        if call.op == "add":
            return Call("row", first.args) if first.op == "row_and_one" and call.args[1] == -1 else None
        if call.op == "clamp_max":
            is_bound = first.op == "row" and is_size(values.number(call.args[1], 1), values.length(first.args[0]))
            return _bounded(first.args, call.args[1]) if is_bound else None
        row = values.meaning(call.args[1]) if call.op == "index" else first
        is_row = row.op in ("row", "row_in_batch") and (call.op == "convert" or first.op == "arange")
        return row if is_row else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        lengths, num_tokens = form.args[:2]
        if num_tokens is None:
            return "has no output_size: how long it is depends on values"
        if values.length(lengths) is None or values.dtype(lengths) not in INTEGERS:
            return "repeats by what is not known to be a vector of integers"
        if values.dtype(node) not in (torch.int32, torch.int64):
            return "does not give int32 or int64"
        return None


def _repeated(lengths: Any, num_tokens: Any) -> Call:
    # Padding, where alone the two differ, is not repeated into being; the field is the bounded one.
    return _bounded((lengths, num_tokens), None) if isinstance(lengths, Call) else Call("row", (lengths, num_tokens))


def _bounded(row: tuple[Any, ...], bound: Any) -> Call:
    return Call("row_in_batch", (*row, None if isinstance(row[0], Call) else bound))


def _match_search(values: Values, sums: Call, call: Call) -> Call | None:
    tokens = values.meaning(call.args[1])
    if tokens.op != "arange" or sums.op not in ("running_sum", "prefix_sum"):
        return None
    (lengths,) = sums.args
    # Sums that overflow are not sorted, unless they are of lengths that were cut already.
    is_whole = values.narrows(call.args[0], lengths)
    op = "row" if sums.op == "running_sum" else "row_and_one"
    return Call(op, (lengths, tokens.args[0])) if is_whole else None
