"""What a backend keeps from one step to the next: how it is laid out, and what it weighs.

A cache knows the shape of one entry; how many entries there are is the engine's to choose. Nothing needs to be reset: a
sequence reads no page before it has written it, and a state only where it has cached tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch


class PoolSizes(NamedTuple):
    """How many entries there are: pages of each KV group, tokens of a page, state slots; numbers or symbols."""

    num_pages: tuple[Any, ...]
    page_size: int
    num_slots: Any


@dataclass(frozen=True)
class Cache(ABC):
    """One cache tensor: `shape` and `dtype` of an entry, of which each `owner` has one."""

    owner: ClassVar[str]  # "token" or "sequence"
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def outer(self, sizes: PoolSizes) -> tuple[Any, ...]:
        """The sizes in front of an entry's in the whole tensor."""

    def whole(self, sizes: PoolSizes) -> tuple[Any, ...]:
        """The shape of the whole tensor."""
        return (*self.outer(sizes), *self.shape)

    def num_bytes(self, sizes: PoolSizes) -> int:
        """Bytes of the whole tensor."""
        return prod(self.whole(sizes)) * self.dtype.itemsize


@dataclass(frozen=True)
class Paged(Cache):
    """An entry for each token: [num_pages, page_size, *shape], addressed by the block table of KV group `group`."""

    owner = "token"
    group: int = 0

    def outer(self, sizes: PoolSizes) -> tuple[Any, ...]:
        return sizes.num_pages[self.group], sizes.page_size


@dataclass(frozen=True)
class State(Cache):
    """An entry for each sequence: [num_slots, *shape], addressed by its state slot."""

    owner = "sequence"

    def outer(self, sizes: PoolSizes) -> tuple[Any, ...]:
        return (sizes.num_slots,)
