"""What stands in for CUDA graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WorkGraphs:
    """Replays by doing the work again, Python included, for steps in plain Python; counts."""

    def __init__(self) -> None:
        self.num_warm_ups = self.num_records = self.num_replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        self.num_warm_ups += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_records += 1

        def replay() -> None:
            self.num_replays += 1
            work()

        return replay


class OpGraphs(WorkGraphs):
    """Replays the ops that were dispatched, on the very tensors of the recording, as a CUDA graph its kernels.

    Unlike a real graph it runs the work while it records it.
    """

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        with _Recorder() as recorder, torch.no_grad():
            work()
        return super().record(recorder.replay)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                # What is a view of something recorded holds the new values already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
