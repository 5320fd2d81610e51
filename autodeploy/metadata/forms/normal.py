"""The one normal way to write each form: the field that it is, or the ops that Inductor's own graphs have for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.metadata import fields
from autodeploy.metadata.forms.calls import Call
from autodeploy.metadata.forms.values import Values
from autodeploy.spelling import recorded_value

_aten, _prims = torch.ops.aten, torch.ops.prims
_SHARED = ("same", "length")  # forms whose value is that of an input, or a view of one


def write(values: Values, node: fx.Node, form: Call) -> fx.Node:
    """The node that has `form` in the dtype of `node`, written in front of `node` where there is none.

    It is `node` itself where that is written normally, where the form has no normal way, and where the caller gets
    `node` and would get what others read.
    """
    writer = _WRITERS.get(form.op)
    first = values.first(form, values.dtype(node))
    if writer is None:
        return node
    if node in values.returned:
        if form.op in _SHARED or first in values.returned:
            return node
        values.returned |= {first} if first is not None else set()
    return first or writer(_Pen(values, node), *form.args)


class _Pen:
    """Writes ops in front of `node`, or finds them among what `node` is computed from."""

    def __init__(self, values: Values, node: fx.Node) -> None:
        self.values = values
        self.node = node
        self.dtype = values.dtype(node)
        inputs = node.all_input_nodes
        self._old = [node, *inputs, *(arg for source in inputs for arg in source.all_input_nodes)]

    def call(self, like: fx.Node, dtype: torch.dtype | None, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A call that gives the shape of `like`."""
        for old in self._old:
            if old.target is target and old.args == args and old.kwargs == kwargs:
                return old
        made = self._insert(target, args, kwargs)
        value = recorded_value(like)
        if isinstance(value, Tensor):
            made.meta["val" if "val" in like.meta else "example_value"] = torch.empty_like(value, dtype=dtype)
        self.values.declare(made, dtype, self.values.shape(like))
        return made

    def field(self, name: str, *args: Any) -> fx.Node:
        """A field in the shape of the node, cast to its dtype."""
        return self.cast(self.call(self.node, torch.int32, fields.get(name).op, *args))

    def cast(self, value: fx.Node) -> fx.Node:
        """`value`, of the shape of the node, in the dtype of the node."""
        if self.values.dtype(value) == self.dtype:
            return value
        meaning = Call("convert", (value, self.dtype))
        cast = self.values.first(meaning, self.dtype)
        if cast is None:
            cast = self.call(self.node, self.dtype, _prims.convert_element_type.default, value, self.dtype)
            self.values.learn(cast, meaning)
        return cast

    def operand(self, value: Any) -> fx.Node:
        """The node that computes an operand."""
        if not isinstance(value, Call):
            return value
        if (first := self.values.first(value, torch.int32)) is not None:
            return first
        name, layout = value.args
        made = self._insert(fields.get(name).op, (layout,), {})
        self.values.declare(made, torch.int32, self.values.shape(value))
        self.values.learn(made, value)
        return made

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.call_function(target, args, kwargs)
        made.meta = {key: self.node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.node.meta}
        return made


def _same(pen: _Pen, value: Any) -> fx.Node:
    return pen.cast(pen.operand(value))


def _length(pen: _Pen, name: str, layout: fx.Node) -> fx.Node:
    return pen.operand(Call("length", (name, layout)))


def _prefix_sum(pen: _Pen, lengths: Any) -> fx.Node:
    meaning = pen.values.meaning(lengths)
    if meaning.op == "length" and meaning.args[0] == "query_lens":
        return pen.field("cu_seqlens_q", meaning.args[1])
    if meaning.op == "ceil_div" and isinstance(meaning.args[0], Call) and meaning.args[0].args[0] == "seq_lens":
        return pen.field("kv_page_indptr", meaning.args[0].args[1], meaning.args[1])
    sums = _sums(pen, pen.operand(lengths), pen.dtype)
    return pen.call(pen.node, pen.dtype, _aten.constant_pad_nd.default, sums, [1, 0], 0.0)


def _sums(pen: _Pen, lengths: fx.Node, dtype: torch.dtype | None) -> fx.Node:
    return pen.call(lengths, dtype, _aten.cumsum.default, lengths, 0, dtype=dtype)


def _last_page_len(pen: _Pen, lengths: Any, page_size: int) -> fx.Node:
    if isinstance(lengths, Call) and lengths.args[0] == "seq_lens":
        return pen.field("last_page_len", lengths.args[1], page_size)
    before = pen.call(pen.node, pen.dtype, _aten.sub.Tensor, pen.operand(lengths), 1)
    rest = pen.call(pen.node, pen.dtype, _aten.remainder.Scalar, before, page_size)
    return pen.call(pen.node, pen.dtype, _aten.add.Tensor, rest, 1)


def _ceil_div(pen: _Pen, numbers: Any, divisor: int) -> fx.Node:
    raised = pen.call(pen.node, pen.dtype, _aten.add.Tensor, pen.operand(numbers), divisor - 1)
    return pen.call(pen.node, pen.dtype, _aten.div.Tensor_mode, raised, divisor, rounding_mode="floor")


def _row(pen: _Pen, lengths: Any, num_tokens: Any) -> fx.Node:
    value = recorded_value(pen.node)
    if isinstance(lengths, Call) or value is None:
        return pen.node  # no field, and without a recorded value the device is not known
    sums = _sums(pen, lengths, torch.int64)
    start = {"start": 0, "step": 1, "dtype": torch.int64, "device": value.device, "requires_grad": False}
    tokens = pen.call(pen.node, torch.int64, _prims.iota.default, num_tokens, **start)
    is_narrow = pen.dtype is torch.int32
    return pen.call(pen.node, pen.dtype, _aten.searchsorted.Tensor, sums, tokens, out_int32=is_narrow, right=True)


def _row_in_batch(pen: _Pen, lengths: Any, num_tokens: Any, bound: Any) -> fx.Node:
    if isinstance(lengths, Call) and lengths.args[0] == "query_lens":
        return pen.field("token_to_seq", lengths.args[1], num_tokens)
    form = Call("row", (lengths, num_tokens))
    row = pen.values.first(form, pen.dtype) or _row(pen, lengths, num_tokens)
    if row is pen.node:
        return row
    pen.values.learn(row, form)
    return pen.call(pen.node, pen.dtype, _aten.clamp_max.default, row, bound)


_WRITERS: dict[str, Callable[..., fx.Node]] = {
    "same": _same,
    "length": _length,
    "prefix_sum": _prefix_sum,
    "last_page_len": _last_page_len,
    "ceil_div": _ceil_div,
    "row": _row,
    "row_in_batch": _row_in_batch,
}
