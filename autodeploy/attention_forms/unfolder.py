"""A node of a graph as a function of places, by rules for ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import Max

from autodeploy.attention_forms.evaluate import Evaluator, Refused
from autodeploy.attention_forms.places import Value, Values, aten, number
from autodeploy.graph.meta import VALUE

_MAX_CONSTANT = 1 << 26  # entries of a tensor that is computed to be looked up in; 64 MB as bool
Places = Sequence[Any]  # a value or an int per dimension
Rule = Callable[["Unfolder", fx.Node, dict[str, Any], Places], Value]  # the entry of a node with these arguments


class Unfolder:
    """Unfolds nodes of `gm`, of which those in `known` depend on positions, sizes and constants alone.

    `length` is the size that sequences have in the graph, `longest` the largest it may be; `same_lengths` are further
    symbols for it. `rule` tells how to unfold a node. `inputs` gives placeholders their values; others count up along
    their last dimension.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        known: set[fx.Node],
        values: Values,
        length: Any,
        longest: int,
        same_lengths: set[Any] | frozenset[Any],
        rule: Callable[[fx.Node], Rule | None],
        inputs: Mapping[fx.Node, Value] | None = None,
    ) -> None:
        self.values = values
        self.longest = longest
        self._gm, self._known, self._inputs = gm, known, inputs or {}
        self._length, self._same_lengths = length, same_lengths
        self._rule = rule
        self._constants = Evaluator(gm, {})
        self._fixed: dict[fx.Node, bool] = {}
        self._unfolded: dict[Any, Value] = {}

    def __call__(self, node: fx.Node, places: Places) -> Value:
        """The entry of `node` at `places`, the last of which belong to its dimensions. Raises Refused."""
        recorded = VALUE.get(node)
        if node not in self._known or not isinstance(recorded, Tensor):
            raise Refused(f"cannot be asked: {node.name} is not known to depend on positions alone")
        # The only entry of a dimension of size one is its first.
        places = places[len(places) - recorded.dim() :]
        places = tuple(0 if is_one(size) else place for size, place in zip(recorded.shape, places, strict=True))
        key = (node, tuple((id(place), place if isinstance(place, int) else None) for place in places))
        if key not in self._unfolded:
            self._unfolded[key] = self._unfold(node, recorded, places)
        return self._unfolded[key]

    def _unfold(self, node: fx.Node, recorded: Tensor, places: Places) -> Value:
        if node in self._inputs:
            return self._inputs[node]
        if self.is_constant(node):
            return self.values.constant(self._constants(node), *places)
        if node.op == "placeholder":
            return self.cast(self.as_value(places[-1]), recorded.dtype)
        rule = self._rule(node)
        if rule is None:
            raise Refused(f"cannot be asked: {node.target} is not known to treat positions one by one")
        return rule(self, node, arguments_of(node), places)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether `node` is the same tensor at all sizes, and not too large to hold."""
        waiting = [node]
        while waiting:
            current = waiting[-1]
            missing = [arg for arg in current.all_input_nodes if arg not in self._fixed]
            waiting += missing
            if not missing:
                self._fixed[current] = self._is_fixed(current)
                waiting.pop()
        return self._fixed[node]

    def _is_fixed(self, node: fx.Node) -> bool:
        recorded = VALUE.get(node)
        if not isinstance(recorded, Tensor):
            return isinstance(recorded, int | float)
        if (
            node not in self._known
            or node.op == "placeholder"
            or not all(isinstance(size, int) for size in recorded.shape)
        ):
            return False
        return recorded.numel() <= _MAX_CONSTANT and all(self._fixed[arg] for arg in node.all_input_nodes)

    def constant(self, node: fx.Node) -> Tensor:
        return self._constants(node)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        if value.dtype == dtype:
            return value
        return self.values.apply(aten.to.dtype, value, dtype, dtype=dtype, is_scalar=value.is_scalar)

    def as_value(self, place: Any) -> Value:
        return self.values.constant(torch.tensor([place]), 0) if isinstance(place, int) else place

    def number(self, arg: Any) -> Any:
        """A number among the arguments of a node: itself, or a value where it depends on the sequence's length."""
        value = VALUE.get(arg) if isinstance(arg, fx.Node) else arg
        if isinstance(value, torch.SymInt):
            return self._linear(value.node.expr)
        if not isinstance(value, int | float):
            raise Refused(f"cannot be asked: {arg} is not a number")
        return value

    def start(self, arg: Any, size: Any) -> Any:
        """Where a slice of a dimension of `size` starts, which `number` tells, or behind all but the last S entries."""
        value = VALUE.get(arg) if isinstance(arg, fx.Node) else arg
        if isinstance(value, torch.SymInt) and isinstance(size, int) and isinstance(value.node.expr, Max):
            length = self._length.node.expr if isinstance(self._length, torch.SymInt) else None
            # Sequences longer than `size` would need more entries than there are: the graph has none.
            if length is not None and set(value.node.expr.args) == {0, size - length}:
                return self._linear(size - length)
        return self.number(arg)

    def _linear(self, expr: Any) -> Any:
        """factor · S + offset, where a size is that."""
        length = self._length.node.expr if isinstance(self._length, torch.SymInt) else None
        if length is None or not length.is_Symbol:
            raise Refused(f"cannot be asked: it depends on a size, {expr}")
        expr = expr.subs(dict.fromkeys(self._same_lengths, length))
        offset = expr.subs(length, 0)
        factor = expr.subs(length, 1) - offset
        if (expr - factor * length - offset).expand() != 0 or not (factor.is_Integer and offset.is_Integer):
            raise Refused(f"cannot be asked: it depends on a size, {expr}")
        return self.values.apply(number, self.values.length, int(factor), int(offset)) if factor else int(offset)

    def static(self, arg: Any) -> Any:
        found = self.number(arg)
        if isinstance(found, Value):
            raise Refused("cannot be asked: it depends on the sequence's length")
        return found

    def shifted(self, place: Any, start: Any, step: int = 1) -> Any:
        """start + step * place, as an int64."""
        if isinstance(place, int) and isinstance(start, int):
            return start + step * place
        place = self.as_value(place)
        if step != 1:
            place = self.values.apply(aten.mul.Tensor, place, step, dtype=torch.int64)
        return place if start == 0 else self.values.apply(aten.add.Tensor, place, start, dtype=torch.int64)


def is_one(size: Any) -> bool:
    return statically_known_true(size == 1)


def base_name(node: fx.Node) -> str:
    """The op's name without namespace and overload; "" for what is not one of ATen."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return ""
    return target._schema.name.split("::")[-1]


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments by name, defaults included."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    schema = target._schema.arguments
    defaults = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    return defaults | dict(zip((arg.name for arg in schema), node.args, strict=False)) | node.kwargs
