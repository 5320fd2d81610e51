"""The vocabulary between canonical ops, backends and the pass that joins them.

A *kind* says what one sort of attention node means (one file in `ops/`); a *backend* says how to run it from a cache
(one file in `kernels/`); a *site* is one such node of one graph, reduced to what a backend may ask about it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.metadata.span import Full, Span


@dataclass(frozen=True)
class CacheSpec:
    """One cache tensor of one attention node, without its outermost sizes.

    kind "paged": allocated as [num_pages, page_size, *shape], addressed by the block table of `group`.
    kind "state": allocated as [num_state_slots, *shape], addressed by the state slot.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int = 0


@dataclass(frozen=True)
class Site:
    """One attention-like node, reduced to static facts. `group`, `num_groups` and `page_size` are
    filled when caches are planned.

    For kind "attention" `params` holds num_heads, num_kv_heads, head_dim, value_dim, scale, causal, softcap,
    has_sinks, has_bias, has_alibi. For "causal_conv1d": channels, kernel_size, has_bias, activation.
    """

    kind: str
    path: str
    layer_type: str
    dtype: torch.dtype
    device: torch.device
    span: Span = field(default_factory=Full)
    group: int = 0
    num_groups: int = 0
    page_size: int = 0
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """One sort of attention node.

    `op` is the canonical overload; `describe(node)` reduces a node that calls it to a Site; `tensors(node)` gives the
    activation and weight arguments in the order that `Backend.call` receives them (None where absent). `layer_types`
    are all that `describe` gives.
    """

    name: str
    op: torch._ops.OpOverload
    describe: Callable[[fx.Node], Site]
    tensors: Callable[[fx.Node], tuple[Any, ...]]
    layer_types: tuple[str, ...]
    meaning: str = ""


class Backend(ABC):
    """One implementation of one kind of attention node over a cache.

    `metadata` and `call` are written as plain eager functions of tensors, as if the layer were alone in the world;
    `insert_cached_attention` records them into the graph once per layer and `share_metadata` merges the copies.
    """

    name: str
    kind: str
    meaning: str = ""

    @abstractmethod
    def why_not(self, site: Site) -> str | None:
        """None where this backend can run `site`, else the reason in one line."""

    @abstractmethod
    def caches(self, site: Site) -> tuple[CacheSpec, ...]:
        """The caches that one such node owns."""

    @abstractmethod
    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        """What `call` needs to know of the batch, by calling fields: a function of `layout` [S, C] int32 alone.

        `num_tokens` is T, the length of the packed token stream, padding included.
        """

    @abstractmethod
    def call(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        """Write this step's tokens to `caches`, and return what the canonical op would have for the packed batch."""
