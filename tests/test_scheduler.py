"""The scheduler alone, with steps that compute nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spans import FULL, SPANS

from autodeploy.errors import OptionError, RequestTooLong
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.metadata.span import Span, Window
from autodeploy.runtime.pages import BlockTables
from autodeploy.runtime.requests import Request, SamplingParams, Status, make_request
from autodeploy.runtime.scheduler import Scheduler


def make_scheduler(
    *,
    num_pages: tuple[int, ...] = (9,),
    spans: tuple[Span, ...] = (FULL,),
    page_size: int = 2,
    max_num_seqs: int = 4,
    max_num_tokens: int = 8,
) -> Scheduler:
    tables = BlockTables(LayoutSpec(page_size, spans), num_pages, max_num_seqs, 64)
    return Scheduler(tables, max_num_tokens=max_num_tokens, max_model_len=100)


def request_of(prompt_len: int, max_tokens: int) -> Request:
    return make_request(np.ones(prompt_len, dtype=np.int32), SamplingParams(max_tokens=max_tokens), None)


def run_step(scheduler: Scheduler) -> list[tuple[Request, int]]:
    """Schedule and pretend to compute: every request whose tokens are all computed gets one more."""
    batch = scheduler.schedule()
    scheduled = list(zip(batch.requests, batch.query_lens.tolist(), strict=True))
    scheduler.commit(batch)
    is_last = scheduler.append(batch, np.full(len(batch.sampled), 7))
    for request in [request for request, last in zip(batch.sampled, is_last, strict=True) if last]:
        scheduler.finish(request, "length")
    return scheduled


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Scheduler, list[Request]]:
    page_size = draw(st.integers(1, 4))
    spans = tuple(draw(st.lists(st.sampled_from(SPANS), max_size=2)))
    max_num_seqs = draw(st.integers(1, 5))
    scheduler = make_scheduler(
        num_pages=tuple(draw(st.integers(3, 12)) for _ in spans),
        spans=spans,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_tokens=draw(st.integers(max_num_seqs, 12)),
    )
    lengths = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), max_size=8))
    fitting = [(p, m) for p, m in lengths if scheduler.tables.fits_alone(p + m - 1)]
    return scheduler, [request_of(*length) for length in fitting]


@settings(deadline=None)
@given(workloads(), st.data())
def test_every_request_ends_with_its_exact_token_count(
    case: tuple[Scheduler, list[Request]], data: st.DataObject
) -> None:
    scheduler, requests = case
    late = list(requests)
    cancelled = set(data.draw(st.lists(st.sampled_from(requests), unique=True, max_size=2))) if requests else set()
    # Only the oldest of those still there is sure to progress, one token a step, so this bounds the steps.
    limit = sum(len(request.tokens) for request in requests) + len(requests)
    for step in range(limit + 1):
        while late and (step % 3 == 0 or not scheduler.running):
            scheduler.add([late.pop(0)])
        if step == 2:
            for request in cancelled - set(late):
                scheduler.finish(request, "cancelled")
        ended = {request for request in requests if request.status is Status.FINISHED}
        oldest = next(iter([*scheduler.running, *scheduler.waiting]), None)
        batch = run_step(scheduler) if oldest else []
        assert oldest is None or oldest in dict(batch), "the oldest request did not move"
        assert ended.isdisjoint(dict(batch)), "a request that has ended runs on"
        assert all(count > 0 for _, count in batch)
        assert sum(count for _, count in batch) <= scheduler.max_num_tokens
        assert all(r.num_tokens - r.num_computed == 1 for r in scheduler.running[:-1]), "two prompts are half computed"
        assert [count for _, count in batch] == sorted((c for _, c in batch), key=lambda count: count > 1)
    assert all(request.status is Status.FINISHED for request in requests)
    for request in requests:
        assert request.finish_reason == "cancelled" or request.num_tokens == len(request.tokens)
    assert not scheduler.tables.tables.any(), "pages are still owned"
    assert len(scheduler.tables.free_rows) == scheduler.tables.tables.shape[1]


def test_decodes_go_first_and_prompts_fill_the_budget_in_chunks() -> None:
    scheduler = make_scheduler(num_pages=(40,))
    first, second, third = request_of(1, 9), request_of(20, 9), request_of(3, 9)
    scheduler.add([first])
    run_step(scheduler)
    scheduler.add([second, third])
    assert run_step(scheduler) == [(first, 1), (second, 7)]
    assert run_step(scheduler) == [(first, 1), (second, 7)]
    assert run_step(scheduler) == [(first, 1), (third, 1), (second, 6)]
    assert run_step(scheduler) == [(first, 1), (second, 1), (third, 2)]


def test_the_youngest_is_preempted_and_computed_anew() -> None:
    scheduler = make_scheduler(num_pages=(5,), page_size=2)
    old, young = request_of(4, 4), request_of(4, 4)
    scheduler.add([old, young])
    assert run_step(scheduler) == [(old, 4), (young, 4)]
    assert run_step(scheduler) == [(old, 1)]
    assert (young.status, young.num_computed, young.num_tokens, young.row) == (Status.WAITING, 0, 5, -1)
    assert scheduler.num_preemptions == 1
    while old.status is not Status.FINISHED:
        run_step(scheduler)
    assert run_step(scheduler) == [(young, 5)]
    assert young.token_ids == (7, 7)


def test_put_back_keeps_the_order_of_arrival() -> None:
    scheduler = make_scheduler(num_pages=(40,), max_num_seqs=2)
    requests = [request_of(2, 3) for _ in range(3)]
    scheduler.add(requests)
    scheduler.schedule()
    scheduler.put_back()
    assert list(scheduler.waiting) == requests
    assert not scheduler.running
    assert not scheduler.tables.tables.any()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((90, 11), "exceed the model's 100"), ((10, 8), "exceed the whole page pool")],
)
def test_a_request_that_can_never_fit_is_refused(lengths: tuple[int, int], message: str) -> None:
    scheduler = make_scheduler()
    scheduler.check_length(10, 7)
    with pytest.raises(RequestTooLong, match=message):
        scheduler.check_length(*lengths)


def test_a_sliding_window_takes_long_requests_into_a_small_pool() -> None:
    make_scheduler(spans=(Window(4),), num_pages=(4,)).check_length(80, 20)


def test_a_budget_below_one_token_per_sequence_is_refused() -> None:
    with pytest.raises(OptionError, match="max_num_tokens is 3 for up to 4"):
        make_scheduler(max_num_tokens=3)
