"""The loop on the host: schedule, pack, copy, step, sample, commit."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from autodeploy.errors import AutodeployError, OptionError
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.metadata.nest import Nested
from autodeploy.ops.cache import Cache, PoolSizes
from autodeploy.options import integer
from autodeploy.runtime.buckets import MIN_SIZE, StepSizes, captured_sizes, padded_sizes
from autodeploy.runtime.caches import allocate_caches, check_memory
from autodeploy.runtime.capture import CapturedStep, CudaGraphs, Graphs, Step
from autodeploy.runtime.detokenizer import Decoder, Detokenizer, Tokenizer
from autodeploy.runtime.outputs import EngineStats, StepOutputs
from autodeploy.runtime.packer import Packer
from autodeploy.runtime.pages import BlockTables
from autodeploy.runtime.prompts import Prompt, as_token_ids
from autodeploy.runtime.requests import Request, RequestOutput, SamplingParams, Status, make_request
from autodeploy.runtime.sampler import NO_TOKEN, best_tokens, sample_tokens
from autodeploy.runtime.scheduler import Batch, Scheduler
from autodeploy.runtime.scoring import Scored, check_logprobs, score
from autodeploy.runtime.staging import Fetch, Link, Staging
from autodeploy.runtime.turns import Turns

# Rows of logits to score prompts by, in one step: as many as fit into this share of an arena, whose rows they are.
_MOST_SCORED, _SCORED_INTS = 256, 1 << 20

_log = logging.getLogger(__name__)


class Engine:
    """Runs requests through `step(input_ids [T] int32, layout [S, C] int32, *caches) -> logits [S, V]`.

    `cache_specs` are in the order of the step's cache arguments. `num_pages` is per KV group, scratch page included.
    On a CUDA device decode steps run as CUDA graphs, made by `graphs` where it is given, unless `cuda_graphs` is False.
    `decode_step` runs decode steps (`ops/step_kind.py`) where it is given; `step` is right for any.
    `vocab_size` is the number of rows of the model's embedding: a token id beyond it would be an error of the step.

    Threads share the steps. Every method may be called from any thread: one steps at a time, with everybody's requests
    in the batch. What a request has is to be read by its owner through `read`, or once it has ended.

    A request fails alone, with `error` set: where its logits are no numbers, where the tokenizer raises, and where the
    step raises for it. A step that raises for several is repeated for each of them alone. An AutodeployError of the
    step is about the engine, not about a request, and is raised to the caller.
    """

    def __init__(
        self,
        step: Step,
        cache_specs: Sequence[Cache],
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
        vocab_size: int | None = None,
        decode_step: Step | None = None,
    ) -> None:
        device = torch.device(device)
        sizes = {"max_num_seqs": max_num_seqs, "max_num_tokens": max_num_tokens, "max_model_len": max_model_len}
        _check_sizes(num_pages, **sizes)
        pools = PoolSizes(tuple(num_pages), layout_spec.page_size, max_num_seqs + 1)
        check_memory(cache_specs, layout_spec, device, num_pages=num_pages, **sizes)
        max_pages = max(MIN_SIZE, -(-max_model_len // layout_spec.page_size))
        max_rows = max(MIN_SIZE, max_num_seqs)
        num_columns = layout_spec.num_columns(max_pages)
        max_num_scored = min(_MOST_SCORED, max_num_tokens, max(1, _SCORED_INTS // num_columns))
        self.stats = EngineStats()
        self._step, self._decode_step = step, decode_step
        self._spec = layout_spec
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decoder = Decoder(tokenizer) if tokenizer else None
        self._vocab_size = vocab_size
        # How many steps have begun: whoever reads sees by it whether somebody has stepped for him.
        self.clock = 0
        self.first_token_at = 0.0
        # Requests come and go at any time; the lists are taken in by who has the turn.
        self._turns = Turns()
        self._arriving: deque[Request] = deque()
        self._leaving: deque[Request] = deque()
        self._tables = BlockTables(layout_spec, num_pages, max_num_seqs, max_pages)
        self._scheduler = Scheduler(
            self._tables,
            max_num_tokens=max_num_tokens,
            max_model_len=max_model_len,
            max_num_scored=max_num_scored,
        )
        link = Link(device)
        most_tokens = max(max_rows, max_num_tokens)
        most_logits = max_rows + max_num_scored
        self._staging = Staging(link, most_tokens, most_logits, num_columns)
        self._packer = Packer(self._staging, self._tables, self._scheduler.sequences)
        self._fetch = Fetch(link, most_logits)
        self._caches = allocate_caches(cache_specs, pools, device)
        if graphs is None and cuda_graphs and device.type == "cuda":
            graphs = CudaGraphs(device)
        self._captured: CapturedStep | None = None
        if graphs is not None:
            self._captured = CapturedStep(decode_step or step, self._staging, self._caches, max_rows, graphs)

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._arriving or self._scheduler.waiting or self._scheduler.running)

    def add(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Queue one request; raises as `make_requests` does."""
        return self.add_many([prompt], [params])[0]

    def add_many(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Request]:
        """Queue requests, all or, where one is refused, none."""
        requests = self.make_requests(prompts, params)
        self.submit(requests)
        return requests

    def make_requests(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Request]:
        """Requests for `submit`.

        Raises RequestTooLong for one that could never end, OptionError for a prompt that is not token ids of the
        model, for stop strings without a tokenizer, and for more log probabilities than there are tokens or memory.
        """
        checked = [(as_token_ids(prompt, self._vocab_size), each) for prompt, each in zip(prompts, params, strict=True)]
        for prompt, each in checked:
            self._scheduler.check_length(len(prompt), each.max_tokens)
            if each.stop and self._decoder is None:
                raise OptionError("stop strings without a tokenizer", fix="give the engine a tokenizer")
        check_logprobs([(len(prompt), each) for prompt, each in checked], self._vocab_size)
        return [make_request(prompt, each, self._detokenizer(each)) for prompt, each in checked]

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests, each of them once."""
        self._arriving.extend(requests)

    def cancel(self, *requests: Request) -> None:
        """End requests and free what they own, now or, while a step runs, behind it. Nothing happens to finished ones.

        Never waits, so that a finalizer may call it.
        """
        self._leaving.extend(requests)
        self._settle()

    def run(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Queue `requests` and step until all have ended, maybe in others' steps; cancelled if this is interrupted."""
        self.submit(requests)
        try:
            while not self._run_on(requests):
                self._settle()
        except BaseException:
            self.cancel(*requests)
            raise
        self._settle()
        return [request.output() for request in requests]

    def read(self, requests: Sequence[Request], clock: int) -> tuple[list[str], int, bool]:
        """The new text of each request, the engine's clock, and whether all have ended; steps if nobody has since."""
        with self._turns:
            if self.clock == clock:
                self._make_step()
            texts = [request.take_text() for request in requests]
            self._leaving += [request for request in requests if request.error]
            seen = texts, self.clock, all(request.status is Status.FINISHED for request in requests)
        self._settle()
        return seen

    def outputs(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """What requests have come to so far."""
        with self._turns:
            found = [request.output() for request in requests]
        self._settle()
        return found

    def step(self) -> StepOutputs:
        """Run one step; returns what each request got that got a token. Nothing if there was nothing to do.

        If this raises, every running request waits again with the tokens it had.
        """
        with self._turns:
            outputs = self._make_step()
        self._settle()
        return outputs

    def _run_on(self, requests: Sequence[Request]) -> bool:
        """One step, unless all `requests` have ended."""
        with self._turns:
            if all(request.status is Status.FINISHED for request in requests):
                return True
            self._make_step()
        return False

    def _settle(self) -> None:
        """Let those go who leave, unless somebody has the turn, who will."""
        while self._leaving and self._turns.try_enter():
            try:
                self._take_in()
                while self._leaving:
                    self._scheduler.finish(self._leaving.popleft(), "cancelled")
            finally:
                self._turns.__exit__()

    def _take_in(self) -> None:
        while self._arriving:
            request = self._arriving.popleft()
            if request.status is Status.WAITING:  # not cancelled before it was queued
                self._scheduler.add([request])

    def _make_step(self) -> StepOutputs:
        self._take_in()
        if not self.has_work:
            return StepOutputs()
        self.clock += 1
        start = perf_counter()
        batch = self._scheduler.schedule()
        try:
            try:
                run = self._run(batch)
            except AutodeployError:
                raise
            except Exception as error:  # a model or a kernel may raise anything
                self._blame(batch, error)
                return StepOutputs()
            returned = perf_counter()
            self._scheduler.commit(batch)
            outputs = self._advance(batch, run)
        except BaseException:
            self._scheduler.put_back()
            raise
        self.first_token_at = self.first_token_at or returned
        self._count(batch.num_tokens, run, run.launched - start + perf_counter() - returned)
        return outputs

    def _run(self, batch: Batch) -> _Run:
        """Pack, send and compute the step."""
        sizes, is_captured = self._sizes(batch), self._is_captured(batch)
        arena = self._staging.graph_arena() if is_captured else self._staging.next_arena()
        nested = self._packer.pack(batch, sizes, arena)
        inputs = nested if is_captured else self._staging.send(nested)
        launched = perf_counter()
        with torch.no_grad():
            tokens, scored, sent = self._compute(batch, sizes, inputs)
        if is_captured:
            self._staging.landed()
        return _Run(tokens, scored, launched, [inputs.buffer.nbytes, *sent])

    def _blame(self, batch: Batch, error: Exception) -> None:
        """After a step that raised: one request ends by it, of several each runs alone."""
        self.stats.num_failed_steps += 1
        if len(batch.requests) > 1:
            _log.warning("a step raised for %d requests, each now runs alone", len(batch.requests), exc_info=error)
            self._scheduler.run_alone(batch.requests)
            return
        self._fail(batch.requests[0], f"its step raised {type(error).__name__}: {error}", error)
        self._scheduler.put_back()

    def _fail(self, request: Request, what: str, cause: Exception | None = None) -> None:
        _log.warning("a request fails: %s", what, exc_info=cause)
        request.fail(what, cause)
        self._scheduler.finish(request, "error")

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        return Detokenizer(self._decoder, params.stop) if self._decoder else None

    def _is_captured(self, batch: Batch) -> bool:
        return self._captured is not None and batch.is_decode

    def _sizes(self, batch: Batch) -> StepSizes:
        _, max_num_seqs, max_pages = self._tables.tables.shape
        pages = -(-batch.longest // self._spec.page_size)
        if self._is_captured(batch):
            return captured_sizes(len(batch.rows), pages, max_num_seqs, max_pages)
        return padded_sizes(batch.num_tokens, batch.num_rows, pages, max_pages)

    def _compute(self, batch: Batch, sizes: StepSizes, inputs: Nested) -> tuple[np.ndarray, Scored | None, list[int]]:
        """Run a step: tokens [k] int64 of `batch.sampled`, log probabilities, bytes of each more copy to the device.

        `inputs` are on the host where the step is captured, on the device otherwise.
        """
        if self._captured and batch.is_decode:
            logits, best = self._captured(sizes, inputs)
        else:
            step = (batch.is_decode and self._decode_step) or self._step
            logits, best = step(inputs.input_ids, inputs.layout, *self._caches), None
        drawing, num_sampled, sent = batch.drawing, len(batch.sampled), []
        if len(drawing) < num_sampled:
            # Over all rows, padding too: cheaper than sending an index to the device.
            tokens = self._fetch(best_tokens(logits) if best is None else best)[batch.logits_rows]
        else:
            tokens = np.empty(num_sampled, dtype=np.int64)
        if drawing:
            rows = np.arange(len(logits))[batch.logits_rows][drawing].tolist()
            drawn, num_bytes = sample_tokens(logits, rows, [batch.sampled[place] for place in drawing])
            tokens[drawing] = self._fetch(drawn)
            sent.append(num_bytes)
        scored = score(batch, logits, tokens) if batch.wants_logprobs else None
        return tokens, scored, [*sent, scored.num_bytes] if scored else sent

    def _advance(self, batch: Batch, run: _Run) -> StepOutputs:
        """Give the requests of a batch their tokens, and end those for which it was the last."""
        tokens = run.tokens
        is_last = self._scheduler.append(batch, tokens)
        if run.scored:
            run.scored.record()
        may_end = tokens == NO_TOKEN
        for eos in self._eos_token_ids:
            may_end |= tokens == eos
        failed = []
        for place in (is_last | may_end).nonzero()[0].tolist():
            request = batch.sampled[place]
            if tokens[place] == NO_TOKEN:
                failed.append(place)
                self._fail(request, "the largest of its logits is NaN or infinite")
                request.drop_last_token()
                continue
            request.ends_with_eos = bool(may_end[place]) and not request.params.ignore_eos
            if request.ends_with_eos or is_last[place]:
                self._scheduler.finish(request, "stop" if request.ends_with_eos else "length")
        # Behind all else, where every request has its token.
        for request in batch.with_stop_strings:
            self._heed_text(request)
        if not failed:
            return StepOutputs(batch.sampled, tokens)
        good = np.delete(np.arange(len(tokens)), failed)
        return StepOutputs([batch.sampled[place] for place in good], tokens[good])

    def _heed_text(self, request: Request) -> None:
        """End a request whose text has come to a stop string, or whose tokenizer has raised."""
        if request.is_stopped():
            self._scheduler.finish(request, "stop")
            request.finish_reason = "stop"  # also where it was its last token
        elif request.error:
            self._scheduler.finish(request, "error")

    def _count(self, num_tokens: int, run: _Run, host_seconds: float) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_tokens += num_tokens
        stats.num_preemptions = self._scheduler.num_preemptions
        stats.num_host_to_device_copies += len(run.sent)
        stats.host_to_device_bytes += sum(run.sent)
        stats.host_seconds += host_seconds


def _check_sizes(num_pages: Sequence[int], **sizes: int) -> None:
    for name, value in sizes.items():
        integer(name, value, least=1, where="Engine")
    for count in num_pages:
        integer("num_pages", count, least=2, where="Engine", also="scratch and one more for each KV group, ")


class _Run(NamedTuple):
    """A step that has run: tokens [k] int64 of `batch.sampled`, log probabilities, when it was launched, bytes of each
    copy to the device."""

    tokens: np.ndarray
    scored: Scored | None
    launched: float
    sent: list[int]
