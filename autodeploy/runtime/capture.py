"""Decode steps as CUDA graphs: the host launches one thing instead of thousands.

A graph is captured for each size on first use. It holds the whole step, prepare_metadata and the choice of the best
token included, and reads and writes memory at the addresses of its capture: the arena on the host that it copies, the
caches and the two outputs here. One pool serves the temporary memory of all graphs, as no two run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from autodeploy.errors import CaptureError
from autodeploy.metadata.nest import Nested
from autodeploy.runtime.buckets import StepSizes
from autodeploy.runtime.sampler import best_tokens
from autodeploy.runtime.staging import Staging

Step = Callable[..., Tensor]


class Graphs(Protocol):
    """Runs work, and records it to be run again."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` once, apart from what the device has been given before."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` launches, without running it; returns what launches it all again."""
        ...


class CudaGraphs:
    """Graphs of `device` that share their temporary memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


class CapturedStep:
    """`step`, right for decode steps at least, which are packed into the graphs' arena of `staging`.

    `logits` [max_num_seqs, V] and `best` [max_num_seqs] int64, the greedy tokens, are written by every run and valid
    until the next.
    """

    def __init__(
        self, step: Step, staging: Staging, caches: Sequence[Tensor], max_num_seqs: int, graphs: Graphs
    ) -> None:
        self._step = step
        self._staging = staging
        self._caches = tuple(caches)
        self._max_num_seqs = max_num_seqs
        self._graphs = graphs
        self._replays: dict[StepSizes, Callable[[], None]] = {}
        self._logits: Tensor | None = None
        self._best = torch.zeros(max_num_seqs, dtype=torch.int64, device=staging.buffer.device)

    @property
    def num_captures(self) -> int:
        return len(self._replays)

    def __call__(self, sizes: StepSizes, nested: Nested) -> tuple[Tensor, Tensor]:
        """Logits [S, V] and greedy tokens [S] of the step `nested`, which lies in the arena; captured on first use.

        Raises CaptureError where the step cannot be captured.
        """
        replay = self._replays.get(sizes)
        if replay is None:
            replay = self._replays[sizes] = self._capture(sizes, nested)
        replay()
        assert self._logits is not None
        return self._logits[: sizes.num_sequences], self._best[: sizes.num_sequences]

    def _capture(self, sizes: StepSizes, nested: Nested) -> Callable[[], None]:
        """Warming up runs the step, so that it runs on padding: a state may be advanced only once."""
        waiting = nested.buffer.clone()
        nested.buffer.zero_()
        try:
            self._graphs.warm_up(lambda: self._run(nested))
            return self._graphs.record(lambda: self._run(nested))
        except RuntimeError as error:
            raise CaptureError(
                f"a decode step of {sizes.num_sequences} sequences cannot be captured as a CUDA graph: {error}",
                fix="cuda_graphs=False runs without; choose a backend that waits for nothing on the host",
            ) from error
        finally:
            # Recording has waited for the copy of the warm-up.
            nested.buffer.copy_(waiting)

    def _run(self, nested: Nested) -> None:
        inputs = self._staging.copy(nested)
        logits_SV = self._step(inputs.input_ids, inputs.layout, *self._caches)
        rows = logits_SV.shape[0]
        if self._logits is None:
            # Not by a capture, whose memory others use again.
            self._logits = logits_SV.new_empty(self._max_num_seqs, logits_SV.shape[1])
        self._logits[:rows].copy_(logits_SV)
        self._best[:rows].copy_(best_tokens(logits_SV))
