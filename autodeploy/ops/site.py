"""One attention node of one graph, reduced to what a backend may ask about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import fx

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.location import module_path, node_location
from autodeploy.graph.meta import VALUE
from autodeploy.metadata.span import Full, Span

F = TypeVar("F")


@dataclass(frozen=True)
class Site(Generic[F]):
    """One attention node, reduced to static facts: those of its kind (`facts`, a frozen dataclass of the kind's file)
    and those that all have. `group`, `num_groups` and `page_size` are filled when caches are planned.
    """

    kind: str
    path: str
    layer_type: str
    dtype: torch.dtype
    device: torch.device
    facts: F
    span: Span = field(default_factory=Full)
    group: int = 0
    num_groups: int = 0
    page_size: int = 0


def recorded(node: fx.Node, *tensors: Any) -> list[Any]:
    """The recorded values of `tensors`, arguments of a canonical `node`. Raises UnsupportedFeature without."""
    if not all(isinstance(arg, fx.Node) and VALUE.on(arg) for arg in tensors):
        raise UnsupportedFeature("an attention node whose inputs have no recorded shapes", where=node_location(node))
    return [VALUE.of(arg) for arg in tensors]


def path_of(node: fx.Node) -> str:
    """How reports and errors name the layer of `node`."""
    return module_path(node) or node.name
