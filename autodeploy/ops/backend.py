"""What a backend is: one implementation of one kind of attention node over a cache (a file each in `kernels`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic

import torch
from torch import Tensor

from autodeploy.ops.cache import Cache
from autodeploy.ops.site import F, Site


class Backend(ABC, Generic[F]):
    """One implementation of one kind of attention node.

    All methods that take tensors are written as plain eager functions, as if the layer were alone in the world;
    `insert_cached_attention` records them into the graph once per layer and `share_metadata` merges the copies.
    """

    name: str
    kind: str
    meaning: str = ""

    @abstractmethod
    def why_not(self, site: Site[F]) -> str | None:
        """None where this backend can run `site`, else the reason in one line."""

    def caches(self, site: Site[F]) -> tuple[Cache, ...]:
        """The caches that one such node owns; none where it needs none."""
        return ()

    @abstractmethod
    def metadata(self, layout: Tensor, num_tokens: int, site: Site[F]) -> dict[str, Tensor]:
        """What the other methods need to know of the batch, by calling fields: a function of `layout` [S, C] int32.

        `num_tokens` is T, the length of the packed token stream, padding included.
        """

    def append(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site[F]
    ) -> None:
        """Write this step's tokens to `caches`. Only the node that owns them does."""

    @abstractmethod
    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site[F]
    ) -> Tensor:
        """What the canonical op would give for the packed batch, read from `caches`; states are advanced here."""

    def append_and_attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site[F]
    ) -> Tensor:
        """Both; a backend that does them in one launch says so here."""
        self.append(tensors, caches, metadata, site)
        return self.attend(tensors, caches, metadata, site)


def why_not_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """None where attention in `dtype` runs on `device`, else why not (shared by the plain-torch backends)."""
    if dtype in (torch.float32, torch.bfloat16, torch.float64):
        return None
    if dtype is torch.float16 and device.type != "cpu":
        return None
    return f"{dtype} is not supported on {device.type}".replace("torch.", "")
