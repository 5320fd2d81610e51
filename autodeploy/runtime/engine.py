"""The loop on the host: schedule, pack, copy, step, sample, commit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from autodeploy.errors import OptionError
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.metadata.nest import Nested
from autodeploy.ops.spec import CacheSpec
from autodeploy.runtime.buckets import MIN_SIZE, StepSizes, captured_sizes, padded_sizes
from autodeploy.runtime.caches import allocate_caches
from autodeploy.runtime.capture import CapturedStep, CudaGraphs, Graphs, Step
from autodeploy.runtime.detokenizer import Detokenizer, Tokenizer
from autodeploy.runtime.packer import Packer
from autodeploy.runtime.pages import BlockTables
from autodeploy.runtime.requests import Request, SamplingParams, Status, as_prompt, make_request
from autodeploy.runtime.sampler import best_tokens, sample_tokens
from autodeploy.runtime.scheduler import Batch, Scheduler
from autodeploy.runtime.staging import Fetch, Link, Staging


class StepOutput(NamedTuple):
    """What one step gave to one request; `text` is what has become certain since it was last asked for."""

    request: Request
    token_id: int
    text: str
    finished: bool


@dataclass
class StepOutputs:
    """What one step gave: `token_ids` [k] int64 to `requests`.

    Iterating over it asks each request for its text, which takes longer than all the rest.
    """

    requests: Sequence[Request] = ()
    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[StepOutput]:
        for request, token in zip(self.requests, self.token_ids.tolist(), strict=True):
            yield StepOutput(request, token, request.take_text(), request.status is Status.FINISHED)


@dataclass
class EngineStats:
    """Totals since the engine was made; over `num_steps` they are averages per step.

    `host_seconds` is the time around the compiled step and the sampling: scheduling, packing, starting the copy,
    bookkeeping. Host-to-device copies are one per step, and one more where a request is not greedy.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_host_to_device_copies: int = 0
    host_to_device_bytes: int = 0
    host_seconds: float = 0.0


class Engine:
    """Runs requests through `step(input_ids [T] int32, layout [S, C] int32, *caches) -> logits [S, V]`.

    `cache_specs` are in the order of the step's cache arguments. `num_pages` is per KV group, scratch page included.
    On a CUDA device decode steps run as CUDA graphs, made by `graphs` where it is given, unless `cuda_graphs` is False.
    Single-threaded: `add`, `cancel` and `step` are to be called from one thread.
    """

    def __init__(
        self,
        step: Step,
        cache_specs: Sequence[CacheSpec],
        layout_spec: LayoutSpec,
        *,
        device: torch.device,
        num_pages: Sequence[int],
        max_model_len: int,
        max_num_seqs: int = 64,
        max_num_tokens: int = 512,
        eos_token_ids: Iterable[int] = (),
        tokenizer: Tokenizer | None = None,
        cuda_graphs: bool = True,
        graphs: Graphs | None = None,
    ) -> None:
        for name, value in (("max_model_len", max_model_len), ("max_num_seqs", max_num_seqs)):
            if value < 1:
                raise OptionError(f"{name} is {value}", where="Engine", fix="it must be at least 1")
        device = torch.device(device)
        max_pages = max(MIN_SIZE, -(-max_model_len // layout_spec.page_size))
        max_rows = max(MIN_SIZE, max_num_seqs)
        self.stats = EngineStats()
        self._step = step
        self._spec = layout_spec
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self._tables = BlockTables(layout_spec, num_pages, max_num_seqs, max_pages)
        self._scheduler = Scheduler(self._tables, max_num_tokens=max_num_tokens, max_model_len=max_model_len)
        link = Link(device)
        # One token more than the budget, for the promise of a decode step.
        most_tokens = max(max_rows, max_num_tokens) + 1
        self._staging = Staging(link, most_tokens, max_rows, layout_spec.num_columns(max_pages))
        self._packer = Packer(self._staging, self._tables, self._scheduler.sequences)
        self._fetch = Fetch(link, max_rows)
        self._caches = allocate_caches(cache_specs, layout_spec.page_size, num_pages, max_num_seqs, device)
        if graphs is None and cuda_graphs and device.type == "cuda":
            graphs = CudaGraphs(device)
        self._captured: CapturedStep | None = None
        if graphs is not None:
            self._captured = CapturedStep(step, self._staging, self._caches, max_rows, graphs)

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def add(self, prompt_token_ids: ArrayLike, params: SamplingParams) -> Request:
        """Queue one request; raises as `add_many` does."""
        return self.add_many([prompt_token_ids], [params])[0]

    def add_many(self, prompts: Sequence[ArrayLike], params: Sequence[SamplingParams]) -> list[Request]:
        """Queue requests, all or, where one is refused, none.

        Raises RequestTooLong for one that could never end, OptionError for a prompt that is not token ids or for stop
        strings without a tokenizer.
        """
        checked = [(as_prompt(prompt), each) for prompt, each in zip(prompts, params, strict=True)]
        for prompt, each in checked:
            self._scheduler.check_length(len(prompt), each.max_tokens)
            if each.stop and self._tokenizer is None:
                raise OptionError("stop strings without a tokenizer", fix="give the engine a tokenizer")
        requests = [make_request(prompt, each, self._detokenizer(each)) for prompt, each in checked]
        self._scheduler.add(requests)
        return requests

    def cancel(self, request: Request) -> None:
        """End a request now and free what it owns; nothing happens to one that is finished."""
        self._scheduler.finish(request, "cancelled")

    def step(self) -> StepOutputs:
        """Run one step; returns what each request got that got a token. Nothing if there was nothing to do.

        If the step raises, so does this, and every running request waits again with the tokens it had.
        """
        if not self.has_work:
            return StepOutputs()
        start = perf_counter()
        batch = self._scheduler.schedule()
        try:
            sizes, is_captured = self._sizes(batch), self._is_captured(batch)
            arena = self._staging.graph_arena() if is_captured else self._staging.next_arena()
            nested = self._packer.pack(batch, sizes, arena)
            inputs = nested if is_captured else self._staging.send(nested)
            launched = perf_counter()
            with torch.no_grad():
                tokens, sampler_bytes = self._compute(batch, sizes, inputs)
            if is_captured:
                self._staging.landed()
            returned = perf_counter()
            self._scheduler.commit(batch)
            outputs = self._advance(batch, tokens)
        except BaseException:
            self._scheduler.put_back()
            raise
        self._count(batch.num_tokens, inputs, sampler_bytes, launched - start + perf_counter() - returned)
        return outputs

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        return Detokenizer(self._tokenizer, params.stop) if self._tokenizer else None

    def _is_captured(self, batch: Batch) -> bool:
        return self._captured is not None and batch.is_decode

    def _sizes(self, batch: Batch) -> StepSizes:
        _, max_num_seqs, max_pages = self._tables.tables.shape
        pages = -(-batch.longest // self._spec.page_size)
        if self._is_captured(batch):
            return captured_sizes(len(batch.rows), pages, max_num_seqs, max_pages)
        longest_query = 1 if batch.is_decode else int(batch.query_lens.max())
        return padded_sizes(batch.num_tokens, len(batch.rows), longest_query, pages, max_pages)

    def _compute(self, batch: Batch, sizes: StepSizes, inputs: Nested) -> tuple[np.ndarray, int]:
        """Run a step: the tokens [k] int64 of `batch.sampled`, and the bytes copied to the device to choose them.

        `inputs` are on the host where the step is captured, on the device otherwise.
        """
        if self._captured and batch.is_decode:
            logits, best = self._captured(sizes, inputs)
        else:
            logits, best = self._step(inputs.input_ids, inputs.layout, *self._caches), None
        drawing, num_sampled = batch.drawing, len(batch.sampled)
        if len(drawing) < num_sampled:
            # Over all rows, padding too: cheaper than sending an index to the device.
            tokens = self._fetch(best_tokens(logits) if best is None else best)[batch.places]
        else:
            tokens = np.empty(num_sampled, dtype=np.int64)
        if not drawing:
            return tokens, 0
        rows = np.arange(len(batch.rows))[batch.places][drawing]
        drawn, num_bytes = sample_tokens(logits, rows.tolist(), [batch.sampled[place] for place in drawing])
        tokens[drawing] = self._fetch(drawn)
        return tokens, num_bytes

    def _advance(self, batch: Batch, tokens: np.ndarray) -> StepOutputs:
        """Give the requests of a batch their tokens, and end those for which it was the last."""
        is_last = self._scheduler.append(batch, tokens)
        is_eos = np.zeros(len(tokens), dtype=bool)
        for eos in self._eos_token_ids:
            is_eos |= tokens == eos
        is_eos &= batch.heeds_eos
        for place in (is_last | is_eos).nonzero()[0].tolist():
            request = batch.sampled[place]
            request.ends_with_eos = bool(is_eos[place])
            self._scheduler.finish(request, "stop" if is_eos[place] else "length")
        # Behind all else: a tokenizer may raise, and by now every request has its token.
        for request in batch.with_stop_strings:
            if request.is_stopped():
                self._scheduler.finish(request, "stop")
                request.finish_reason = "stop"  # also where it was its last token
        return StepOutputs(batch.sampled, tokens)

    def _count(self, num_tokens: int, inputs: Nested, sampler_bytes: int, host_seconds: float) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_tokens += num_tokens
        stats.num_preemptions = self._scheduler.num_preemptions
        stats.num_host_to_device_copies += 1 + (sampler_bytes > 0)
        stats.host_to_device_bytes += inputs.buffer.nbytes + sampler_bytes
        stats.host_seconds += host_seconds
