"""Concrete values of a part of a graph: what a mask is at real sizes, what an attention gives for random inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_aggregate, map_arg

from autodeploy.graph.aliasing import mutated
from autodeploy.graph.along import arguments_of, name_of
from autodeploy.graph.edit import get_attribute, look_at
from autodeploy.graph.effects import is_pure
from autodeploy.graph.meta import VALUE
from autodeploy.graph.spelling import NUMBERS

# Ops that read nothing but the shape of their first argument, and what they fill with where the name says it.
_FILLED_LIKE = {"zeros_like": 0, "ones_like": 1, "full_like": None, "new_zeros": 0, "new_ones": 1, "new_full": None}
_FILLED_LIKE |= {"fill": None}
# Ops that read nothing but the shape, or the dtype, of their second argument.
_LIKE_OTHERS = {"type_as", "expand_as", "view_as", "reshape_as"}
_POSITIONS = ("position_ids", "cache_position", "positions")  # how the names of such inputs end


class Refused(Exception):
    """An attention that has no canonical form; the message says why, as the end of a sentence about its node."""


class Evaluator:
    """Values of nodes, computed on demand and kept.

    `sizes` gives each sympy symbol of the graph's shapes a number, `given` gives nodes their values; integer inputs
    that are called positions count up along their last dimension. Everything else must be known (`learn`).
    """

    def __init__(self, gm: fx.GraphModule, sizes: Mapping[Any, int], given: Mapping[fx.Node, Any] | None = None):
        self._gm = gm
        self._sizes = sizes
        self._values: dict[fx.Node, Any] = dict(given or {})

    def __call__(self, node: fx.Node) -> Any:
        """The value of `node`. Raises Refused where an op fails at these sizes."""
        waiting = [node]
        while waiting:
            current = waiting[-1]
            is_source = current in self._values or self._is_source(current)
            missing = [] if is_source else [arg for arg in reads(current) if arg not in self._values]
            waiting += missing
            if missing:
                continue
            if current not in self._values:
                self._values[current] = self._compute(current)
            waiting.pop()
        return self._values[node]

    def shape(self, value: Tensor) -> list[int]:
        """The shape of a recorded tensor at these sizes."""
        return [int(self._number(size)) for size in value.shape]

    def _is_source(self, node: fx.Node) -> bool:
        return node.op in ("placeholder", "get_attr") or isinstance(VALUE.get(node), NUMBERS)

    def _compute(self, node: fx.Node) -> Any:
        value = VALUE.get(node)
        if isinstance(value, NUMBERS):
            return self._number(value)
        if node.op == "get_attr":
            look_at(self._gm, str(node.target))
            return get_attribute(self._gm, str(node.target))
        if node.op == "placeholder":
            assert isinstance(value, Tensor)
            shape = self.shape(value)
            return torch.arange(shape[-1], dtype=value.dtype, device=value.device).expand(shape)
        if name_of(node) in _FILLED_LIKE:
            return self._filled(node)
        if _is_like_other(node):
            return self._like(node)
        args, kwargs = map_arg((node.args, node.kwargs), self._values.__getitem__)
        assert callable(node.target)
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise Refused(f"cannot be evaluated at the sizes {self._sizes}: {node.name}: {reason}") from error

    def _filled(self, node: fx.Node) -> Tensor:
        """What is filled to the shape of an argument, of which nothing else is known."""
        recorded = VALUE.of(node)
        fill: Any = _FILLED_LIKE[name_of(node)]
        if fill is None:
            arguments = arguments_of(node)
            given: Any = arguments.get("fill_value", arguments.get("value"))
            fill = map_arg(given, self._values.__getitem__)
        return torch.full(self.shape(recorded), fill, dtype=recorded.dtype, device=recorded.device)

    def _like(self, node: fx.Node) -> Tensor:
        """A cast or a view that makes its first argument like another, of which nothing else is known."""
        tensor, recorded = self._values[node.all_input_nodes[0]], VALUE.of(node)
        shape = self.shape(recorded)
        tensor = tensor.expand(shape) if name_of(node) == "expand_as" else tensor.reshape(shape)
        return tensor.to(recorded.device, recorded.dtype)

    def _number(self, value: Any) -> Any:
        expr = value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value
        if expr is value:
            return value
        number = expr.subs(self._sizes)
        if number.free_symbols:
            raise Refused(f"depends on a size, {expr}, that is not one of an input")
        return bool(number) if isinstance(value, torch.SymBool) else int(number) if number.is_integer else float(number)


class Knowledge(NamedTuple):
    """`known` nodes depend on positions, sizes and constants alone; `written` ones may be written to in place."""

    known: set[fx.Node]
    written: set[fx.Node]


def learn(gm: fx.GraphModule, given: Iterable[fx.Node] = ()) -> Knowledge:
    """What can be told of the nodes of `gm` in one sweep, where the inputs `given` are known."""
    found = Knowledge(set(given), mutated(gm.graph).values)
    for node in gm.graph.nodes:
        if node not in found.written and _is_known(gm, node, found.known):
            found.known.add(node)
    return found


def _is_known(gm: fx.GraphModule, node: fx.Node, found: set[fx.Node]) -> bool:
    value = VALUE.get(node)
    if isinstance(value, NUMBERS):
        return not free_unbacked_symbols(value)
    if node.op == "placeholder":
        return is_positions(node)
    if node.op == "get_attr":
        return not isinstance(get_attribute(gm, str(node.target)), torch.nn.Parameter)
    return node.op == "call_function" and is_pure(node) and all(arg in found for arg in reads(node))


def reads(node: fx.Node) -> list[fx.Node]:
    """The arguments of `node` of which it reads more than the shape."""
    inputs = node.all_input_nodes
    if name_of(node) in _FILLED_LIKE:
        return inputs[1:]
    return inputs[:1] if _is_like_other(node) else inputs


def _is_like_other(node: fx.Node) -> bool:
    return name_of(node) in _LIKE_OTHERS or node.target is torch.ops.aten.to.other


def is_positions(node: fx.Node) -> bool:
    """Whether an input is the positions of tokens, to go by its name: integers, along the last dimension."""
    value = VALUE.get(node)
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype is torch.bool:
        return False
    return value.dim() > 0 and node.name.strip("_").endswith(_POSITIONS)


def cone(node: fx.Node) -> Iterator[fx.Node]:
    """`node` and everything that it is computed from, each once."""
    seen = {node}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        yield current
        new = [arg for arg in reads(current) if arg not in seen]
        seen.update(new)
        waiting += new


def constants(node: fx.Node) -> Iterator[int | float]:
    """The numbers written out among the arguments of `node` and of what it is computed from."""
    found: list[int | float] = []

    def keep(value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append(value)
        return value

    for current in cone(node):
        map_aggregate((current.args, current.kwargs), keep)
    yield from found
