"""What is known of each value while a graph is read in order: its meaning, dtype and shape, and who has it first."""

from __future__ import annotations

import operator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autodeploy.aliasing import returned
from autodeploy.metadata.fields import is_field
from autodeploy.metadata.forms.calls import Call, is_int
from autodeploy.spelling import is_measure, recorded_value

INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64})
_EXACT = INTEGERS | {torch.bool}
_KEEPS_SHAPE = frozenset(["add", "sub", "neg", "remainder", "floor_divide", "where", "cumsum", "convert"])
_TYPED_BY_FIRST = frozenset(["clamp_max", "index", "repeat", "rows"])


class Values:
    """The values of one graph, learnt in graph order.

    Most come with a recorded fake tensor. Of a layout and what is computed from it without one, dtype and shape are
    inferred as far as the rules need them; its sizes are ("S", layout) and ("C", layout).
    `layouts` are the inputs that are layouts of our own, [S, 3 + G * P] int32: those that fields are computed from.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._meanings: dict[fx.Node, Call] = {}
        self._types: dict[fx.Node, tuple[torch.dtype | None, tuple[Any, ...] | None]] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._first: dict[Any, fx.Node] = {}
        inputs = graph.find_nodes(op="placeholder")
        self.layouts = {node for node in inputs if any(_is_field_of(user, node) for user in node.users)}
        for layout in self.layouts:
            self._types[layout] = (torch.int32, (("S", layout), ("C", layout)))

    @cached_property
    def returned(self) -> set[fx.Node]:
        """What reaches the caller, who may write to it."""
        return returned(self._graph)

    def operand(self, value: Any) -> Any:
        """What stands for `value` in a Call: a field's meaning, or the first node of equal meaning."""
        if type(value) is not fx.Node:
            return value
        meaning = self._meanings.get(value)
        return meaning if meaning is not None and meaning.op == "length" else self._same.get(value, value)

    def meaning(self, value: Any) -> Call:
        """What `value` computes; of what is not known, Call("value", (value,))."""
        return value if isinstance(value, Call) else self._meanings.get(value) or Call("value", (value,))

    def first(self, meaning: Call, dtype: torch.dtype | None) -> fx.Node | None:
        """The first node of that meaning and dtype."""
        return self._first.get((meaning, dtype))

    def infer(self, node: fx.Node, call: Call) -> None:
        """Find the dtype and shape of `node`, spelled `call`, where none is recorded."""
        if recorded_value(node) is None:
            self.declare(node, self._infer_dtype(node, call), self._infer_shape(call))

    def declare(self, node: fx.Node, dtype: torch.dtype | None, shape: tuple[Any, ...] | None) -> None:
        """Say what dtype and shape a node has that carries no recorded value."""
        self._types[node] = (dtype, shape)

    def learn(self, node: fx.Node, meaning: Call) -> None:
        """Say that `node` computes `meaning`."""
        self._meanings[node] = meaning
        dtype = self.dtype(node)
        # The size of a constant is not always part of its meaning.
        if dtype in _EXACT and meaning.op not in ("full", "arange"):
            self._same[node] = self._first.setdefault((meaning, dtype), node)

    def equate(self, node: fx.Node, other: Any) -> None:
        """Say that `node` is `other`, to the dtype."""
        if isinstance(other, fx.Node):
            self._same[node] = other
        self._meanings[node] = self.meaning(other)

    def is_identity(self, node: fx.Node, call: Call) -> bool:
        """Whether `node` is x[:] or a cast of x to its own dtype."""
        if call.op == "convert":
            return self.dtype(node) is not None and self.dtype(node) == self.dtype(call.args[0])
        return call.op == "slice" and call.args[1:] == (0, None)

    def dtype(self, value: Any) -> torch.dtype | None:
        """The dtype of a tensor, None for what is none or not known."""
        if isinstance(value, Call):
            return torch.int32 if value.op == "length" else None
        recorded = recorded_value(value)
        if recorded is None:
            return self._types.get(value, (None, None))[0]
        return recorded.dtype if isinstance(recorded, Tensor) else None

    def shape(self, value: Any) -> tuple[Any, ...] | None:
        """The sizes of a tensor, None for what is none or not known."""
        if isinstance(value, Call):
            return (self.shape(value.args[1]) or ())[:1] if value.op == "length" else None
        recorded = recorded_value(value)
        if recorded is None:
            return self._types.get(value, (None, None))[1]
        return tuple(recorded.shape) if isinstance(recorded, Tensor) else None

    def narrows(self, source: Any, result: Any) -> bool:
        """Whether `result` has an integer dtype of no more bits than that of `source`."""
        wide, narrow = self.dtype(source), self.dtype(result)
        return wide in INTEGERS and narrow in INTEGERS and wide.itemsize >= narrow.itemsize

    def unwidened(self, value: Any) -> Any:
        """The integers that `value` holds in more bits, or `value`."""
        meaning = self.meaning(value)
        return meaning.args[0] if meaning.op == "convert" and self.narrows(value, meaning.args[0]) else value

    def constant(self, value: Any) -> int | None:
        """The one integer that a literal or a tensor is known to hold."""
        if is_int(value):
            return value
        meaning = self.meaning(value)
        return meaning.args[0] if meaning.op == "full" and self.dtype(value) in INTEGERS else None

    def same_shape(self, a: Any, b: Any) -> bool:
        """Whether two tensors are known to have the same shape."""
        shape_a, shape_b = self.shape(a), self.shape(b)
        if shape_a is None or shape_b is None or len(shape_a) != len(shape_b):
            return False
        return all(is_size(size_a, size_b) for size_a, size_b in zip(shape_a, shape_b, strict=True))

    def length(self, value: Any) -> Any:
        """The size of a one-dimensional tensor, None for all else."""
        shape = self.shape(value)
        return shape[0] if shape is not None and len(shape) == 1 else None

    def number(self, value: Any, offset: int = 0) -> Any:
        """The size that an argument stands for, plus `offset`; None where it is not known."""
        if not isinstance(value, fx.Node):
            return value + offset
        recorded = recorded_value(value)
        if recorded is not None:
            return recorded + offset
        meaning = self._meanings.get(value)
        if meaning is not None and meaning.op == "add" and isinstance(meaning.args[1], int):
            return self.number(meaning.args[0], meaning.args[1] + offset)
        return self._measured(value) if offset == 0 else None

    def _measured(self, node: fx.Node) -> Any:
        """Of `x.shape[i]` and sym_size(x, i), the size of x."""
        if node.op != "call_function" or len(node.args) != 2:
            return None
        source, dim = node.args
        if node.target is operator.getitem and isinstance(source, fx.Node) and is_measure(source):
            source = source.args[0]
        shape = self.shape(source)
        return shape[dim] if shape is not None and isinstance(dim, int) and dim < len(shape) else None

    def _infer_dtype(self, node: fx.Node, call: Call) -> torch.dtype | None:
        if call.op in ("cumsum", "arange", "full"):
            default = None if call.op == "full" else torch.int64
            return node.kwargs.get("dtype", default)  # type: ignore[return-value]
        if call.op == "convert":
            return call.args[1]
        if call.op == "count_upto":
            return torch.int32 if node.kwargs.get("out_int32") else torch.int64
        if call.op in _TYPED_BY_FIRST:
            return self.dtype(call.args[0])
        dtypes = {self.dtype(tensor) for tensor in _tensors(call)}
        return dtypes.pop() if len(dtypes) == 1 else None

    def _infer_shape(self, call: Call) -> tuple[Any, ...] | None:
        if call.op == "full":
            return call.args[1]
        tensors = _tensors(call) if call.op in _KEEPS_SHAPE else []
        same = bool(tensors) and all(self.same_shape(tensors[0], tensor) for tensor in tensors)
        return self.shape(tensors[0]) if same else None


def _tensors(call: Call) -> list[Any]:
    """What a call computes with, the condition of `where` left out."""
    return [arg for arg in call.args[call.op == "where" :] if isinstance(arg, fx.Node | Call)]


def _is_field_of(user: fx.Node, layout: fx.Node) -> bool:
    return is_field(user.target) and user.all_input_nodes[0] is layout


def is_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    if a is None or b is None:
        return False
    return a == b if isinstance(a, tuple) or isinstance(b, tuple) else statically_known_true(a == b)


def holds_no_integers(node: fx.Node) -> bool:
    """Whether `node` is recorded to hold neither signed integers nor truth values: most of a large graph."""
    value = recorded_value(node)
    return isinstance(value, Tensor) and value.dtype not in _EXACT
