"""What a backend keeps from one step to the next: how it is laid out, and what it weighs.

A cache knows the shape of one entry; how many entries there are is the engine's to choose. Nothing needs to be reset: a
sequence reads no page before it has written it, and a state only where it has cached tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch


class PoolSizes(NamedTuple):
    """How many entries there are: pages of each KV group, tokens of a page, state slots; numbers or symbols."""

    num_pages: tuple[Any, ...]
    page_size: int
    num_slots: Any


@dataclass(frozen=True)
class Cache(ABC):
    """One cache tensor: `shape` and `dtype` of the entry of one token, or of one sequence."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

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

    group: int = 0

    def outer(self, sizes: PoolSizes) -> tuple[Any, ...]:
        return sizes.num_pages[self.group], sizes.page_size


@dataclass(frozen=True)
class State(Cache):
    """An entry for each sequence: [num_slots, *shape], addressed by its state slot."""

    def outer(self, sizes: PoolSizes) -> tuple[Any, ...]:
        return (sizes.num_slots,)
