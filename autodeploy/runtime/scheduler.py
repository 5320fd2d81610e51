"""Which sequences take how many tokens in the next step.

Continuous batching, in order of arrival: first the running requests, then new ones while pages, rows and the token
budget last. A prompt is cut into chunks where it takes more than is left. As nothing starts behind such a cut, only the
youngest running request can be in the middle of its prompt: the order of arrival is also decodes first.

The oldest request takes at least one token in every step and is never preempted, and any request fits the pools alone,
so every request ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from autodeploy.errors import OptionError, RequestTooLong
from autodeploy.runtime.pages import BlockTables
from autodeploy.runtime.requests import FinishReason, Request, Status


class Scheduler:
    """Requests in order of arrival: `running` ones own a row and pages, `waiting` ones own nothing.

    `max_num_tokens` is the budget of one step. Raises OptionError where it would not give every running sequence one.
    """

    def __init__(self, tables: BlockTables, *, max_num_tokens: int, max_model_len: int) -> None:
        if max_num_tokens < len(tables.free_rows):
            raise OptionError(
                f"max_num_tokens is {max_num_tokens} for up to {len(tables.free_rows)} sequences",
                fix="a step needs a token for every running sequence: raise max_num_tokens or lower max_num_seqs",
            )
        self.tables = tables
        self.max_num_tokens = max_num_tokens
        self.max_model_len = max_model_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

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

    def schedule(self) -> list[tuple[Request, int]]:
        """The next step: each request with how many tokens it computes, those with one token first.

        Gives rows and pages away, but counts no token as computed: `commit` does, once the step has returned.
        """
        counts: dict[Request, int] = {}
        for request in tuple(self.running):
            if request.status is Status.RUNNING:
                self._grow(request, counts)
        while self.waiting and self._budget(counts) > 0 and self.tables.fits_now(self.waiting[0].num_tokens):
            request = self.waiting.popleft()
            request.row, request.status = self.tables.acquire(), Status.RUNNING
            self.running.append(request)
            self._grow(request, counts)
        return sorted(counts.items(), key=lambda item: item[1] > 1)

    def commit(self, batch: Iterable[tuple[Request, int]]) -> None:
        """Count a step's tokens as computed and free the pages that fell behind a window."""
        for request, count in batch:
            request.num_computed += count
            self.tables.drop_unread(request.row, request.num_computed)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, wherever it stands, and free what it owns. A finished one stays as it is."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self._release(request)
        else:
            self.waiting.remove(request)
        request.status, request.finish_reason = Status.FINISHED, reason

    def put_back(self) -> None:
        """Preempt everything that runs: after a failed step nobody knows what the caches hold."""
        while self.running:
            self._preempt(self.running[-1])

    def _budget(self, counts: dict[Request, int]) -> int:
        return self.max_num_tokens - sum(counts.values())

    def _grow(self, request: Request, counts: dict[Request, int]) -> None:
        """Schedule as many tokens of `request` as budget and pages allow, at the cost of younger requests if none.

        The youngest keeps what it has and sits the step out: preempting itself would only make it start again.
        """
        wanted = _num_left(request)
        # A decode is within the budget by construction, and summing it up for each would cost their square.
        if wanted > 1:
            wanted = min(wanted, self._budget(counts))
        while wanted > 0 and not self.tables.extend(request.row, request.num_computed + wanted):
            room = self.tables.capacity(request.row) - request.num_computed
            youngest = self.running[-1]
            if room > 0:
                wanted = room
            elif youngest is request:
                return
            else:
                assert youngest not in counts, "older requests are scheduled first"
                self._preempt(youngest)
        if wanted > 0:
            counts[request] = wanted

    def _preempt(self, request: Request) -> None:
        """Take everything from the youngest running request; its tokens so far are computed anew later."""
        self._release(request)
        request.status, request.num_computed = Status.WAITING, 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self.tables.release(request.row)
        self.running.remove(request)
        request.row = -1


def _num_left(request: Request) -> int:
    """Tokens known but not computed: 1 while decoding."""
    return request.num_tokens - request.num_computed
