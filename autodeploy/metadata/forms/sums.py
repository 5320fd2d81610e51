"""Rules of sums: lengths of a batch, and prefix sums of them. All arithmetic is modulo 2^n, as in torch."""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from autodeploy.metadata.forms.calls import Call, is_int
from autodeploy.metadata.forms.values import INTEGERS, Values, is_size
from autodeploy.metadata.layout import CONTEXT_LEN, QUERY_LEN

_COLUMNS = {QUERY_LEN: "query_lens", CONTEXT_LEN: "context_lens"}


class Column:
    """layout[:, 0] == query_lens(layout), layout[:, 1] == context_lens(layout): by definition."""

    roots: ClassVar[tuple[str, ...]] = ("column",)

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        source, index = call.args
        known = is_int(index) and index in _COLUMNS and source in values.layouts
        return Call("length", (_COLUMNS[index], source)) if known else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        return None


class SeqLens:
    """c + q == seq_lens, s - q == context_lens, s - c == query_lens, of fields of one layout: by definition."""

    roots: ClassVar[tuple[str, ...]] = ("add", "sub")
    _results: ClassVar = {
        ("add", "context_lens", "query_lens"): "seq_lens",
        ("add", "query_lens", "context_lens"): "seq_lens",
        ("sub", "seq_lens", "query_lens"): "context_lens",
        ("sub", "seq_lens", "context_lens"): "query_lens",
    }

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        first, second = map(values.meaning, call.args) if isinstance(call.args[1], Call) else (None, None)
        if first is None or second is None or first.op != "length" or first.args[1] is not second.args[1]:
            return None
        name = self._results.get((call.op, first.args[0], second.args[0]))
        return Call("length", (name, first.args[1])) if name else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        return None


class ContextLens:
    """(c + q) - q == c, modulo 2^n, hence for all integers."""

    roots: ClassVar[tuple[str, ...]] = ("sub",)

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        whole, part = values.meaning(call.args[0]), call.args[1]
        if whole.op != "add" or part not in whole.args or values.dtype(node) != values.dtype(call.args[0]):
            return None
        return Call("same", (whole.args[whole.args[0] == part],))

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        (kept,) = form.args
        if values.dtype(node) not in INTEGERS or values.dtype(kept) not in INTEGERS:
            return "takes away what was added, but not of integers"
        return None if values.same_shape(node, kept) else "takes away what was added, but in another shape"


class Offset:
    """(x + a) + b == x + (a + b) for literals a and b, modulo 2^n, hence for all integers."""

    roots: ClassVar[tuple[str, ...]] = ("add",)

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        inner, offset = values.meaning(call.args[0]), call.args[1]
        if not is_int(offset) or inner.op != "add" or not is_int(inner.args[1]) or values.dtype(node) not in INTEGERS:
            return None
        return Call("add", (inner.args[0], inner.args[1] + offset))

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        return None


class RunningSum:
    """cumsum(q) in any integer dtype, narrowed afterwards, or [0, cumsum q][1:].

    Casting to fewer bits is reduction modulo 2^n and commutes with sums; casting to more bits does not.
    """

    roots: ClassVar[tuple[str, ...]] = ("cumsum", "convert", "slice")

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        source = call.args[0]
        meaning = values.meaning(source)
        if values.dtype(node) not in INTEGERS:
            return None
        if call.op == "cumsum":
            is_vector = values.length(source) is not None and values.dtype(source) in INTEGERS
            return Call("running_sum", (values.unwidened(source),)) if is_vector else None
        if call.op == "convert":
            return meaning if meaning.op == "running_sum" and values.narrows(source, node) else None
        return _part(values, node, call) if meaning.op == "prefix_sum" else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        return None


def _part(values: Values, node: fx.Node, call: Call) -> Call | None:
    """The slice of a prefix sum without its first or last entry."""
    source, start, end = call.args
    length, whole = values.length(node), values.length(source)
    is_shorter_by_one = length is not None and is_size(length + 1, whole)
    (q,) = values.meaning(source).args
    if start == 1 and is_int(start) and (end is None or is_shorter_by_one):
        return Call("running_sum", (q,))
    return Call("starts", (q,)) if start == 0 and is_int(start) and (end == -1 or is_shorter_by_one) else None


class PrefixSum:
    """[0, cumsum q], by padding, by concatenation, or written into zeros; narrowed before or after."""

    roots: ClassVar[tuple[str, ...]] = ("pad", "cat", "slice_scatter", "convert")

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        source = call.args[0]
        if call.op == "cat":
            zero, source = call.args
            if values.constant(zero) != 0 or not is_size(values.length(zero), 1):
                return None
        elif call.op == "slice_scatter":
            zeros, source = call.args
            length = values.length(source)
            if values.constant(zeros) != 0 or length is None or not is_size(length + 1, values.length(node)):
                return None
            written = values.meaning(source)
            source = written.args[1] if written.op == "copy" else source
        meaning = values.meaning(source)
        if meaning.op != ("prefix_sum" if call.op == "convert" else "running_sum"):
            return None
        return Call("prefix_sum", meaning.args) if values.narrows(source, node) else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        return None


class Diff:
    """diff([0, cumsum q]) == cumsum(q) - [0, cumsum q][:-1] == q, modulo 2^n, cast to the dtype of the sum."""

    roots: ClassVar[tuple[str, ...]] = ("diff", "sub")

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None:
        first = values.meaning(call.args[0])
        if call.op == "diff":
            return Call("same", first.args) if first.op == "prefix_sum" else None
        second = values.meaning(call.args[1])
        one = (first.op, second.op) == ("running_sum", "starts") and first.args == second.args
        same_dtype = values.dtype(call.args[0]) == values.dtype(call.args[1]) == values.dtype(node)
        return Call("same", first.args) if one and same_dtype else None

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None:
        return None
