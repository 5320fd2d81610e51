"""The loop on the host: schedule, nest, copy, step, sample, commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from autodeploy.errors import OptionError
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.metadata.nest import Arena, Nested, nest_sequences
from autodeploy.ops.spec import CacheSpec
from autodeploy.runtime.buckets import MIN_SIZE, padded_sizes
from autodeploy.runtime.caches import allocate_caches
from autodeploy.runtime.detokenizer import Detokenizer, Tokenizer
from autodeploy.runtime.pages import BlockTables
from autodeploy.runtime.requests import Request, SamplingParams, Status, as_prompt, make_request
from autodeploy.runtime.sampler import sample_tokens
from autodeploy.runtime.scheduler import Scheduler

Step = Callable[..., Tensor]
Batch = list[tuple[Request, int]]


class StepOutput(NamedTuple):
    """What one step gave to one request."""

    request: Request
    token_id: int
    text: str
    finished: bool


@dataclass
class EngineStats:
    """Totals since the engine was made; over `num_steps` they are averages per step.

    `host_seconds` is the time around the compiled step and the sampling: scheduling, nesting, the copy, bookkeeping.
    Host-to-device copies are one per step, and one more where a request is not greedy.
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
    ) -> None:
        for name, value in (("max_model_len", max_model_len), ("max_num_seqs", max_num_seqs)):
            if value < 1:
                raise OptionError(f"{name} is {value}", where="Engine", fix="it must be at least 1")
        max_pages = max(MIN_SIZE, -(-max_model_len // layout_spec.page_size))
        self.stats = EngineStats()
        self._step = step
        self._spec = layout_spec
        self._device = torch.device(device)
        self._num_pages = tuple(num_pages)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self._tables = BlockTables(layout_spec, num_pages, max_num_seqs, max_pages)
        self._scheduler = Scheduler(self._tables, max_num_tokens=max_num_tokens, max_model_len=max_model_len)
        self._arena = Arena.allocate(
            max(MIN_SIZE, max_num_tokens), max(MIN_SIZE, max_num_seqs), layout_spec.num_columns(max_pages)
        )
        self._caches = allocate_caches(cache_specs, layout_spec.page_size, num_pages, max_num_seqs, self._device)

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
        if request.status is Status.FINISHED:
            return
        if request.detokenizer is not None:
            request.text += request.detokenizer.flush()
        self._scheduler.finish(request, "cancelled")

    def step(self) -> list[StepOutput]:
        """Run one step; returns one entry per request that got a token. Empty if there was nothing to do.

        If the step raises, so does this, and every running request waits again with the tokens it had.
        """
        if not self.has_work:
            return []
        start = perf_counter()
        batch = self._scheduler.schedule()
        assert batch, "the oldest request can always run"
        sampled = [(row, r) for row, (r, count) in enumerate(batch) if r.num_computed + count == r.num_tokens]
        rows, requests = [row for row, _ in sampled], [request for _, request in sampled]
        try:
            nested = self._nest(batch).to(self._device)
            launched = perf_counter()
            with torch.no_grad():
                logits = self._step(nested.input_ids, nested.layout, *self._caches)
                tokens, sampler_bytes = sample_tokens(logits, rows, requests)
            returned = perf_counter()
            self._scheduler.commit(batch)
            outputs = [self._advance(request, token) for request, token in zip(requests, tokens, strict=True)]
        except BaseException:
            self._scheduler.put_back()
            raise
        self._count(batch, nested, sampler_bytes, launched - start + perf_counter() - returned)
        return outputs

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        return Detokenizer(self._tokenizer, params.stop) if self._tokenizer else None

    def _nest(self, batch: Batch) -> Nested:
        requests = [request for request, _ in batch]
        query_lens = np.array([count for _, count in batch])
        context_lens = np.array([request.num_computed for request in requests])
        rows = np.array([request.row for request in requests])
        tokens = [r.tokens[r.num_computed : r.num_computed + count] for r, count in batch]
        longest = -(-int((query_lens + context_lens).max()) // self._spec.page_size)
        sizes = padded_sizes(int(query_lens.sum()), len(batch), longest, self._tables.tables.shape[2])
        return nest_sequences(
            np.concatenate(tokens),
            query_lens,
            context_lens,
            self._tables.tables[:, rows, : sizes.pages_per_sequence],
            rows + 1,
            self._spec,
            num_pages=self._num_pages,
            num_state_slots=self._tables.tables.shape[1] + 1,
            arena=self._arena,
            pad_tokens=sizes.num_tokens,
            pad_sequences=sizes.num_sequences,
            pages_per_sequence=sizes.pages_per_sequence,
        )

    def _advance(self, request: Request, token: int) -> StepOutput:
        """Give a request its token, and end it if that was the last."""
        is_last = request.num_tokens + 1 == len(request.tokens)
        is_eos = token in self._eos_token_ids and not request.params.ignore_eos
        text, stopped = "", False
        # Text first: a tokenizer may raise, and then the request must not have its token yet.
        if detokenizer := request.detokenizer:
            text = "" if is_eos else detokenizer.push(token)
            text += detokenizer.flush() if is_eos or is_last else ""
            stopped = detokenizer.stopped
        request.append(token)
        request.text += text
        if is_eos or stopped or is_last:
            self._scheduler.finish(request, "stop" if is_eos or stopped else "length")
        return StepOutput(request, token, text, request.status is Status.FINISHED)

    def _count(self, batch: Batch, nested: Nested, sampler_bytes: int, host_seconds: float) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_tokens += sum(count for _, count in batch)
        stats.num_preemptions = self._scheduler.num_preemptions
        stats.num_host_to_device_copies += 1 + (sampler_bytes > 0)
        stats.host_to_device_bytes += nested.buffer.nbytes + sampler_bytes
        stats.host_seconds += host_seconds
