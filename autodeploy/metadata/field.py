"""What a field is: a tensor that can be derived from the layout, by one plain formula.

A field is an op in the namespace `autodeploy_field` whose body *is* its formula, so that it is a leaf in FX graphs
(equal fields merge by name and parameters) and ordinary ATen once Inductor sees it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer, Proxy

from autodeploy.errors import OptionError
from autodeploy.graph import values
from autodeploy.graph.dependence import find_scalars

NAMESPACE = "autodeploy_field"
_library = torch.library.Library(NAMESPACE, "DEF")
_catalogue: dict[str, Field] = {}


@dataclass(frozen=True)
class Field:
    """One entry of the catalogue.

    `shape` is in the letters above; `depends` is what the value depends on beside the batch itself: any of "P" (page
    size), "G" (KV group), "W" (span), "H" (head configuration or kernel size); `padding` says what padding rows or
    tokens hold.
    """

    name: str
    formula: Callable[..., Tensor]
    op: torch._ops.OpOverload
    shape: str
    depends: str
    padding: str
    meaning: str
    device: str = "device"


def field(
    *, shape: str, depends: str = "", padding: str = "", device: str = "device"
) -> Callable[..., Callable[..., Tensor]]:
    """Register a formula as a field and return the op that computes it.

    The formula takes `layout` [S, C] int32 first, then `num_tokens` where it makes something per token, then int
    parameters and names of spans; its docstring's first line is its meaning. It must be pure, in plain torch, with
    annotations.
    """

    def register(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = formula.__name__
        if name in _catalogue:
            raise OptionError(f"field {name!r} is registered twice", where=inspect.getfile(formula), fix="rename it")
        schema = torch.library.infer_schema(formula, mutates_args=())
        _library.define(f"{name}{schema}")
        _library.impl(name, formula, "CompositeImplicitAutograd")
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        values.formulas[op] = formula
        meaning = (formula.__doc__ or name).strip().splitlines()[0]
        _catalogue[name] = Field(name, formula, op, shape, depends, padding, meaning, device)
        return op

    return register


def registered() -> tuple[Field, ...]:
    """The fields of all modules that have been loaded, in that order."""
    return tuple(_catalogue.values())


def of_op(op: object) -> Field:
    """The field that an FX node's target computes."""
    return next(entry for entry in _catalogue.values() if entry.op is op)


@cache
def num_ops(target: Any) -> int:
    """How many torch ops a node with this target comes to: 1, or those of its formula where it is a field."""
    if not is_field(target):
        return 1
    formula = of_op(target).formula
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    parameters = inspect.signature(formula).parameters.values()
    formula(
        *(
            "window_1" if each.annotation == "str" else Proxy(graph.placeholder(each.name), tracer)
            for each in parameters
        )
    )
    scalars = find_scalars(graph)
    ops = [node for node in graph.nodes if node.op in ("call_function", "call_method") and node not in scalars]
    return sum(num_ops(node.target) for node in ops)


def is_field(target: object) -> bool:
    """Whether an FX node's target is a field."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


class FieldRequest(NamedTuple):
    """A field by name, with those of its parameters that are neither the layout nor the number of tokens, in order."""

    name: str
    parameters: tuple[int | str, ...]


class FieldLauncher(Protocol):
    """Computes many fields by one launch: what a device has where its formulas, lowered one by one, would be slow."""

    def supports(self, request: FieldRequest) -> bool:
        """Whether a launch can compute this field."""
        ...

    def launch(self, layout: Tensor, num_tokens: int, requests: Sequence[FieldRequest]) -> list[Tensor]:
        """The fields asked for, each equal to its formula; written for proxies, like a formula."""
        ...
