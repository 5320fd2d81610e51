"""Between host and device: one copy there with the step, one back with its tokens, and nobody waits for the first.

A copy from pinned memory runs while the host goes on. So its source must not be written before it has ended: there are
several arenas that take turns, each with an event that is recorded behind its copy and waited for before it is
written again. One more arena belongs to CUDA graphs, whose copy is part of the graph: starting a copy and recording an
event took the host 44 us of a step. It is free again once the tokens of its step have come back. On the device there
is one buffer, at an address that never changes; the stream keeps a copy into it behind the step that reads it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from autodeploy.errors import OptionError
from autodeploy.metadata.nest import Arena, Nested

NUM_ARENAS = 2  # that take turns


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

    def wait(self) -> None:
        """Wait for everything that the device was given."""
        if self.is_async:
            torch.cuda.synchronize(self.device)

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
    """Arenas on the host, those that take turns first, and the buffer on the device that steps read, [N] int32."""

    def __init__(self, link: Link, num_tokens: int, num_sequences: int, num_columns: int) -> None:
        self._link = link
        self.arenas = [
            Arena.allocate(num_tokens, num_sequences, num_columns, pinned=link.is_async) for _ in range(NUM_ARENAS + 1)
        ]
        self.buffer = torch.zeros(self.arenas[0].buffer.numel(), dtype=torch.int32, device=link.device)
        self._events = [link.event() for _ in range(NUM_ARENAS)]
        self._turn = 0
        self._has_graph_run = False

    def next_arena(self) -> int:
        """The number of the arena whose turn it is; once this returns, it may be written."""
        self._turn = (self._turn + 1) % NUM_ARENAS
        self._events[self._turn].synchronize()
        return self._turn

    def send(self, nested: Nested) -> Nested:
        """Start copying a step, packed into the arena whose turn it is, to the device; returns it as it lies there."""
        sent = self.copy(nested)
        self._events[self._turn].record()
        return sent

    def copy(self, nested: Nested) -> Nested:
        """The copy of `send`, for a graph to record."""
        sent = replace(nested, buffer=self.buffer[: nested.buffer.numel()])
        self._link.copy(sent.buffer, nested.buffer)
        return sent

    def graph_arena(self) -> int:
        """The number of the graphs' arena; once this returns, it may be written. `landed` has to follow its step."""
        if self._has_graph_run:
            self._link.wait()
        self._has_graph_run = True
        return NUM_ARENAS

    def landed(self) -> None:
        """Say that everything that the device was given has ended."""
        self._has_graph_run = False


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
