"""Between host and device: one copy there with the step, one back with its tokens, and nobody waits for the first.

A copy from pinned memory runs while the host goes on. So its source must not be written before it has ended: there are
several arenas that take turns, each with an event that is recorded behind its copy and waited for before it is
written again. On the device there is one buffer, at an address that never changes; the stream keeps a copy into it
behind the step that reads it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from autodeploy.errors import OptionError
from autodeploy.metadata.nest import Arena, Nested

NUM_ARENAS = 2


class Event(Protocol):
    """A point in a stream, as torch.cuda.Event is."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Link:
    """Copies between the host and `device`, in the order of the device's current stream.

    Raises OptionError for a GPU that is not the current one: events and kernels would go to that.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
            raise OptionError(
                f"the model is on {device}, the current device is cuda:{torch.cuda.current_device()}",
                fix=f"torch.cuda.set_device({device.index}) first",
            )
        self.device = device
        self.is_async = device.type == "cuda"

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Start copying; with an asynchronous device, the copy may end later than this returns."""
        target.copy_(source, non_blocking=True)

    def event(self) -> Event:
        """An event, not recorded yet: waiting for it returns at once."""
        return torch.cuda.Event() if self.is_async else _Done()


class _Done:
    """The event of a device that has always finished."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Staging:
    """Arenas on the host that take turns, and the buffer on the device that steps read, [N] int32."""

    def __init__(self, link: Link, num_tokens: int, num_sequences: int, num_columns: int) -> None:
        self._link = link
        self.arenas = [
            Arena.allocate(num_tokens, num_sequences, num_columns, pinned=link.is_async) for _ in range(NUM_ARENAS)
        ]
        self.buffer = torch.zeros(self.arenas[0].buffer.numel(), dtype=torch.int32, device=link.device)
        self._events = [link.event() for _ in self.arenas]
        self._turn = 0
        self._views: list[tuple[Nested, Nested] | None] = [None] * len(self.arenas)

    def next_arena(self) -> int:
        """The number of the arena whose turn it is; once this returns, it may be written."""
        self._turn = (self._turn + 1) % len(self.arenas)
        self._events[self._turn].synchronize()
        return self._turn

    def send(self, nested: Nested) -> Nested:
        """Start copying a step, packed into the arena whose turn it is, to the device; returns it as it lies there."""
        view = self._views[self._turn]
        if view is None or view[0] is not nested:
            view = self._views[self._turn] = nested, replace(nested, buffer=self.buffer[: nested.buffer.numel()])
        sent = view[1]
        self._link.copy(sent.buffer, nested.buffer)
        self._events[self._turn].record()
        return sent


class Fetch:
    """Brings tokens, up to `size` int64, from the device."""

    def __init__(self, link: Link, size: int) -> None:
        self._link = link
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=link.is_async)
        self._tokens = self._host.numpy()
        self._event = link.event()

    def __call__(self, tokens: Tensor) -> np.ndarray:
        """Wait for `tokens` [k] int64 and all work before them; a copy."""
        count = tokens.numel()
        self._link.copy(self._host[:count], tokens)
        self._event.record()
        self._event.synchronize()
        return self._tokens[:count].copy()
