"""Which sequences take how many tokens in the next step.

Continuous batching, in order of arrival: first the running requests, then new ones while pages, rows and the token
budget last. A prompt is cut into chunks where it takes more than is left. As nothing starts behind such a cut, only the
youngest running request can be in the middle of its prompt: the order of arrival is also decodes first.

The oldest request takes at least one token in every step and is never preempted, and any request fits the pools alone,
so every request ends.

Where all that runs decodes and nothing new can start, the next step has the requests of the last one, in the same
order; such a step is scheduled with a few array operations and without a look at any request.

Where a step has raised, nobody knows for which request. So each of the batch runs alone until it has its token or
raises by itself: every request gets on or ends, and nobody waits for one that cannot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from autodeploy.errors import OptionError, RequestTooLong
from autodeploy.runtime.pages import BlockTables, Change
from autodeploy.runtime.requests import FinishReason, Request, Status
from autodeploy.runtime.sequences import Sequences


@dataclass(eq=False)
class Batch:
    """The requests of one step, or of all decode steps in a row as long as they stay the same.

    `rows` [n], `query_lens` [n] and `context_lens` [n], int64, are those of the next step; where that `is_decode`,
    every query_len is 1 and every request is sampled. Those that are stand at `places` of the batch. `num_logits` [n]
    int64 is how many rows of logits each request has in the step. `longest` is the most tokens, cached and new, of a
    sequence. `changes` is what became of the block tables since the first step.
    """

    requests: list[Request]
    rows: np.ndarray
    query_lens: np.ndarray
    context_lens: np.ndarray
    places: np.ndarray | slice
    num_logits: np.ndarray
    is_decode: bool
    num_tokens: int
    longest: int
    changes: list[Change] = field(default_factory=list)

    @staticmethod
    def of(requests: list[Request], query_lens: list[int], sequences: Sequences) -> Batch:
        """The first step of these requests."""
        rows = np.array([request.row for request in requests])
        lengths, context_lens = np.array(query_lens), sequences.num_computed[rows]
        seq_lens = context_lens + lengths
        places = (seq_lens == sequences.num_tokens[rows]).nonzero()[0]
        is_decode = len(places) == len(rows) == sum(query_lens)
        sampled = slice(len(rows)) if is_decode else places
        num_logits = np.zeros(len(rows), dtype=np.int64)
        num_logits[sampled] = 1
        for place, request in enumerate(requests):
            if request.num_unscored:
                num_logits[place] = rows_to_score(request, query_lens[place])
        num_tokens, longest = sum(query_lens), int(seq_lens.max())
        return Batch(requests, rows, lengths, context_lens, sampled, num_logits, is_decode, num_tokens, longest)

    @cached_property
    def sampled(self) -> list[Request]:
        """The requests that get a token [k]."""
        return [self.requests[place] for place in np.arange(len(self.rows))[self.places]]

    @cached_property
    def num_rows(self) -> int:
        """Rows of the layout that the step needs, one for each request and each row of logits."""
        return max(len(self.rows), int(self.num_logits.sum()))

    @cached_property
    def logits_rows(self) -> np.ndarray | slice:
        """[k] Which rows of the step's logits are those of the sampled requests: the last of each."""
        ends = self.num_logits.cumsum()
        return slice(len(self.sampled)) if ends[-1] == len(self.sampled) else ends[self.places] - 1

    @cached_property
    def wants_logprobs(self) -> bool:
        """Whether anybody asks for log probabilities in this step."""
        return any(request.scores is not None or request.num_unscored for request in self.requests)

    @cached_property
    def limits(self) -> np.ndarray:
        """[k] The number of tokens at which each sampled request ends."""
        return np.array([len(request.tokens) for request in self.sampled])

    @cached_property
    def drawing(self) -> list[int]:
        """Which of the sampled requests are not greedy."""
        return [index for index, request in enumerate(self.sampled) if request.generator is not None]

    @cached_property
    def with_stop_strings(self) -> list[Request]:
        """The sampled requests whose text may end them."""
        return [request for request in self.sampled if request.params.stop]


class Scheduler:
    """Requests in order of arrival: `running` ones own a row and pages, `waiting` ones own nothing.

    `max_num_tokens` is the budget of one step, and `max_num_scored` (at least 1) that of rows of logits to score
    prompts by. Raises OptionError where a step's budget would not give every running sequence a token.
    """

    def __init__(
        self, tables: BlockTables, *, max_num_tokens: int, max_model_len: int, max_num_scored: int = 2**31
    ) -> None:
        if max_num_tokens < len(tables.free_rows):
            raise OptionError(
                f"max_num_tokens is {max_num_tokens} for up to {len(tables.free_rows)} sequences",
                fix="a step needs a token for every running sequence: raise max_num_tokens or lower max_num_seqs",
            )
        self.tables = tables
        self.sequences = Sequences(len(tables.free_rows), max_model_len)
        self.max_num_tokens = max_num_tokens
        self.max_model_len = max_model_len
        self.max_num_scored = max_num_scored
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._decoding: Batch | None = None
        self._alone: list[Request] = []

    def check_length(self, prompt_len: int, max_tokens: int) -> None:
        """Raise RequestTooLong for a request that could not end even if it ran alone."""
        length = prompt_len + max_tokens
        if length > self.max_model_len:
            raise RequestTooLong(
                f"{prompt_len} prompt tokens and max_tokens {max_tokens} exceed the model's {self.max_model_len}",
                fix="shorten the prompt or lower max_tokens",
            )
        # The last token is sampled but never computed, so it needs no place.
        if not self.tables.fits_alone(length - 1):
            raise RequestTooLong(
                f"{prompt_len} prompt tokens and max_tokens {max_tokens} exceed the whole page pool",
                where=f"num_pages {tuple(pool.num_pages for pool in self.tables.pools)}",
                fix="give the engine more pages, shorten the prompt or lower max_tokens",
            )

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests whose lengths have been checked."""
        self.waiting.extend(requests)

    def schedule(self) -> Batch:
        """The next step: each request with how many tokens it computes, those with one token first.

        Gives rows and pages away, but counts no token as computed: `commit` does, once the step has returned.
        """
        if self._alone:
            return self._schedule_alone(self._alone[-1])
        batch = self._decoding
        if batch is None or self._may_start(batch.num_tokens):
            return self._schedule_each()
        changes = self.tables.extend_each(batch.rows, batch.context_lens)
        if changes is None:
            return self._schedule_each()
        batch.changes += changes
        return batch

    def commit(self, batch: Batch) -> None:
        """Count a step's tokens as computed and free the pages that fell behind a window."""
        batch.context_lens += batch.query_lens
        self.sequences.num_computed[batch.rows] = batch.context_lens
        if self._alone and len(batch.sampled):
            self._alone.pop()
        if batch.is_decode:
            batch.longest += 1
            batch.changes += self.tables.drop_each(batch.rows, batch.context_lens)
            # Not where the youngest sits out.
            self._decoding = batch if len(batch.requests) == len(self.running) else None
            return
        for request in batch.requests:
            self.tables.drop_unread(request.row, request.num_computed)

    def append(self, batch: Batch, tokens: np.ndarray) -> np.ndarray:
        """Add `tokens` [k] to the sampled requests of a committed batch; returns [k] bool, which are complete."""
        rows, lengths = batch.rows[batch.places], batch.context_lens[batch.places]
        self.sequences.tokens[rows, lengths] = tokens
        lengths = lengths + 1
        self.sequences.num_tokens[rows] = lengths
        return lengths == batch.limits

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, wherever it stands, and free what it owns. A finished one stays as it is."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self._release(request)
        elif request in self.waiting:  # or is not queued yet
            self.waiting.remove(request)
        if request in self._alone:
            self._alone.remove(request)
        request.status, request.finish_reason = Status.FINISHED, reason

    def put_back(self) -> None:
        """Preempt everything that runs: after a failed step nobody knows what the caches hold."""
        while self.running:
            self._preempt(self.running[-1])

    def run_alone(self, requests: Iterable[Request]) -> None:
        """Preempt everything, and give each of these a token in a step of its own before any other step.

        The youngest first: each then waits in front of those behind it, as before.
        """
        self.put_back()
        self._alone = list(requests)

    def _may_start(self, num_scheduled: int) -> bool:
        """Whether a waiting request would start beside `num_scheduled` tokens."""
        waiting = self.waiting
        return bool(waiting) and num_scheduled < self.max_num_tokens and self.tables.fits_now(waiting[0].num_tokens)

    def _is_cut(self, counts: dict[Request, int]) -> bool:
        """Whether the youngest request ends this step in the middle of its prompt."""
        return bool(self.running) and counts.get(self.running[-1], 0) < _num_left(self.running[-1])

    def _schedule_each(self) -> Batch:
        """Any step, by a look at each request."""
        self._decoding = None
        counts: dict[Request, int] = {}
        for request in tuple(self.running):
            if request.status is Status.RUNNING:
                self._grow(request, counts)
        while self._may_start(sum(counts.values())) and not self._is_cut(counts):
            request = self.waiting.popleft()
            self._start(request)
            self._grow(request, counts)
        assert counts, "the oldest request can always run"
        ordered = sorted(counts.items(), key=lambda item: item[1] > 1)
        return Batch.of([request for request, _ in ordered], [count for _, count in ordered], self.sequences)

    def _schedule_alone(self, request: Request) -> Batch:
        """A step of `request` with nothing else in the pools."""
        if request.status is Status.WAITING:
            self.put_back()
            self.waiting.remove(request)
            self._start(request)
        counts: dict[Request, int] = {}
        self._grow(request, counts)
        return Batch.of([request], [counts[request]], self.sequences)

    def _start(self, request: Request) -> None:
        self.sequences.enter(request, self.tables.acquire())
        request.status = Status.RUNNING
        self.running.append(request)

    def _grow(self, request: Request, counts: dict[Request, int]) -> None:
        """Schedule as many tokens of `request` as budget and pages allow, at the cost of younger requests if none.

        The youngest keeps what it has and sits the step out: preempting itself would only make it start again.
        """
        wanted = _num_left(request)
        # A decode is within the budget by construction, and summing it up for each would cost their square.
        if wanted > 1:
            wanted = min(wanted, self.max_num_tokens - sum(counts.values()))
        if request.num_unscored:
            scored = sum(rows_to_score(each, count) for each, count in counts.items() if each.num_unscored)
            wanted -= max(0, rows_to_score(request, wanted) - (self.max_num_scored - scored))
            if wanted < 1:
                return
        while not self.tables.extend(request.row, request.num_computed + wanted):
            room = self.tables.capacity(request.row) - request.num_computed
            youngest = self.running[-1]
            if room > 0:
                wanted = room
            elif youngest is request:
                return
            else:
                assert youngest not in counts, "older requests are scheduled first"
                self._preempt(youngest)
        counts[request] = wanted

    def _preempt(self, request: Request) -> None:
        """Take everything from the youngest running request; its tokens so far are computed anew later."""
        self._release(request)
        request.status, request.num_computed = Status.WAITING, 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self._decoding = None
        self.tables.release(request.row)
        self.running.remove(request)
        self.sequences.leave(request)


def rows_to_score(request: Request, query_len: int) -> int:
    """Rows of logits that an unscored request has in a step of `query_len` tokens: row i scores token i + 1."""
    assert request.prompt_scores is not None
    first = max(request.num_computed, request.prompt_scores.count)
    return max(0, request.num_computed + query_len - first)


def _num_left(request: Request) -> int:
    """Tokens known but not computed: 1 while decoding."""
    return request.num_tokens - request.num_computed
