"""What a kind is: one sort of attention node, whatever model it is in (one complete file each in `ops/kinds`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, fx

from autodeploy.ops.backend import Backend
from autodeploy.ops.site import F, Site


@dataclass(frozen=True)
class Door:
    """Where a kind enters a model that is traced: in place of a function that its modeling file has, or of a method.

    `name` is that of a function of the modeling module or, with `owner`, of a method of that class.
    """

    name: str
    function: Callable[..., Any]
    owner: str | None = None


@dataclass(frozen=True)
class Written:
    """What a model wrote itself: `output` is what `canonical`, a function that calls the canonical op, gives for
    `inputs`. Tensors among these become constants of the graph.
    """

    output: fx.Node
    canonical: Callable[..., Any]
    inputs: tuple[fx.Node | Tensor | None, ...]


class Kind(ABC, Generic[F]):
    """One sort of attention node: any that mixes tokens along the sequence.

    `op` is the canonical overload, `near` ATen ops that a node of this kind is made of where the model wrote it itself.
    `layer_types` are all that `describe` gives. `tolerances` are (atol, rtol) by dtype of a backend against the op.
    `token_dims` says which dimension of each of a node's tensors holds tokens, None for what all tokens share, and
    `result_dim` which one of its result does.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    op: ClassVar[torch._ops.OpOverload]
    layer_types: ClassVar[tuple[str, ...]]
    tolerances: ClassVar[Mapping[torch.dtype, tuple[float, float]]]
    token_dims: ClassVar[tuple[int | None, ...]]
    result_dim: ClassVar[int]
    doors: ClassVar[tuple[Door, ...]] = ()
    near: ClassVar[tuple[torch._ops.OpOverload, ...]] = ()

    @property
    @abstractmethod
    def reference(self) -> Backend:
        """The oracle among backends, the same object each time."""

    @abstractmethod
    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """The activations and weights of a node, None where absent, in the order in which backends receive them."""

    @abstractmethod
    def describe(self, node: fx.Node) -> Site[F]:
        """The site of a node. Raises UnsupportedFeature."""

    @abstractmethod
    def example(self, dtype: torch.dtype, device: torch.device) -> Site[F]:
        """One plain layer: what backends are asked about to say whether they run on a machine at all."""

    @abstractmethod
    def operands(self, site: Site[F], num_tokens: int) -> tuple[Tensor | None, ...]:
        """Random tensors of one sequence, on the site's device, in the order of `tensors`; for tests and timings."""

    @abstractmethod
    def run(self, tensors: tuple[Any, ...], site: Site[F]) -> Tensor:
        """The canonical op, asked what `site` says."""

    def appended(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """All of `tensors` that `Backend.append` reads: layers that have them in common share one cache.

        Empty where nobody can share.
        """
        return ()

    def recognize(self, node: fx.Node) -> Written | str | None:
        """What the model wrote around `node`, an op of `near` with users, or why it is not known what that is.

        None where the node is nothing of this kind.
        """
        return f"mixes tokens, but came through no door of {self.name}"
