"""One engine, many threads: everybody gets what he would have got alone, and what nobody reads is not kept."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from hash_model import NAN, RAISES, HashModel, LetterTokenizer, assert_nothing_owned, make_engine
from test_llm import PROMPTS, SIZES, SMALL_POOL
from tiny_models import tiny

import autodeploy as ad
from autodeploy.errors import OptionError, RequestFailed, RequestTooLong
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.requests import SamplingParams
from autodeploy.runtime.stream import Stream

GREEDY = ad.SamplingParams(max_tokens=12, ignore_eos=True)
DRAWN = ad.SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=3)
NUM_THREADS = 4


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each work gives, all begun at once."""
    start = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=300) for future in [pool.submit(begin, work) for work in works]]


@pytest.fixture(scope="module", params=["llama", "lfm2"])
def llm(request: pytest.FixtureRequest) -> ad.LLM:
    return ad.LLM(tiny(request.param), LetterTokenizer(), compile=False, num_pages=SMALL_POOL, **SIZES)


def test_threads_get_what_they_get_alone(llm: ad.LLM) -> None:
    """`generate` and `stream`, greedy and drawn, with more work than the pool holds at once."""

    def generate(params: ad.SamplingParams) -> list[str]:
        return [output.text for output in llm.generate(PROMPTS, params)]

    def stream(params: ad.SamplingParams) -> list[str]:
        return ["".join(llm.stream(prompt, params)) for prompt in PROMPTS]

    expected = {params: generate(params) for params in (GREEDY, DRAWN)}
    works = [(ask, params) for ask in (generate, stream) for params in (GREEDY, DRAWN)]
    answers = in_threads(*(lambda ask=ask, params=params: ask(params) for ask, params in works))
    for (_, params), answer in zip(works, answers, strict=True):
        assert answer == expected[params]
    assert not llm._engine.has_work


def test_threads_share_steps(llm: ad.LLM) -> None:
    """Four answers at once take about as many steps as one, not four times as many."""
    before = llm.stats.num_steps
    llm.generate(PROMPTS[0], GREEDY)
    alone = llm.stats.num_steps - before
    in_threads(*[lambda: llm.generate(PROMPTS[0], GREEDY)] * NUM_THREADS)
    assert llm.stats.num_steps - before - alone < NUM_THREADS * alone


def hash_engine(**options: Any) -> tuple[HashModel, Engine]:
    model = HashModel(page_size=4)
    return model, make_engine(model, tokenizer=LetterTokenizer(), **options)


def stream_of(engine: Engine, *prompts: list[int], max_tokens: int = 20, **params: Any) -> Stream:
    settings = SamplingParams(max_tokens, **params)
    return Stream(engine, engine.make_requests(prompts, [settings] * len(prompts)))


def text_of(model: HashModel, prompt: list[int], max_tokens: int = 20) -> str:
    return LetterTokenizer().decode(list(model.expected(prompt, max_tokens)), skip_special_tokens=True)


def test_a_stream_that_is_never_read_costs_nothing() -> None:
    model, engine = hash_engine()
    streams = [stream_of(engine, [1, 2], [3]) for _ in range(50)]
    assert not engine.has_work
    assert "".join(text for _, text in stream_of(engine, [5])) == text_of(model, [5])
    del streams
    assert_nothing_owned(engine)


@pytest.mark.parametrize("end", ["dropped", "closed", "left by an error", "in a cycle"])
def test_a_stream_that_is_left_half_way_frees_what_it_owns(end: str) -> None:
    model, engine = hash_engine()
    stream = stream_of(engine, [1, 2], [3, 4])
    next(stream)
    assert engine._scheduler.running
    if end == "dropped":
        del stream
    elif end == "closed":
        with closing(stream):
            next(stream)
        assert list(stream) == []
    elif end == "left by an error":
        with pytest.raises(ZeroDivisionError):
            leave(stream)
        del stream
    else:
        stream.itself = stream  # type: ignore[attr-defined]
        del stream
        gc.collect()
    assert not engine.has_work
    assert_nothing_owned(engine)
    assert "".join(text for _, text in stream_of(engine, [5])) == text_of(model, [5])


def gather(stream: Stream, texts: list[str]) -> None:
    for index, text in stream:
        texts[index] += text


def leave(stream: Stream) -> None:
    for _ in stream:
        raise ZeroDivisionError


def test_a_stream_may_be_closed_while_another_thread_reads_it() -> None:
    _, engine = hash_engine()
    stream, begun = stream_of(engine, [1], max_tokens=60), threading.Event()
    step, is_closed = engine._step, threading.Event()

    def slow_step(*inputs: Any) -> Any:
        begun.set()
        assert is_closed.wait(60)
        return step(*inputs)

    def close() -> None:
        assert begun.wait(60)
        stream.close()
        is_closed.set()

    engine._step = slow_step
    read, _ = in_threads(lambda: list(stream), close)
    assert len(read) <= 1
    assert not engine.has_work
    assert_nothing_owned(engine)


def test_what_is_cancelled_before_it_is_queued_never_runs() -> None:
    _, engine = hash_engine()
    early, other = engine.make_requests([[1], [2]], [SamplingParams(5)] * 2)
    engine.cancel(early)
    outputs = engine.run([early, other])
    assert [(output.finish_reason, len(output.token_ids)) for output in outputs] == [("cancelled", 0), ("length", 5)]
    assert_nothing_owned(engine)


def test_garbage_that_is_collected_inside_a_step_is_let_go_behind_it() -> None:
    model, engine = hash_engine()
    streams = [stream_of(engine, [1], max_tokens=40)]
    next(streams[0])
    step = engine._step

    def dropping_step(*inputs: Any) -> Any:
        streams.clear()
        return step(*inputs)

    engine._step = dropping_step
    assert "".join(text for _, text in stream_of(engine, [5])) == text_of(model, [5])
    assert not engine.has_work
    assert_nothing_owned(engine)


def test_what_fails_is_raised_once_the_others_are_read(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "autodeploy")
    model, engine = hash_engine()
    for bad in ([2, NAN], [RAISES]):
        stream, texts = stream_of(engine, [5], bad, [6]), ["", "", ""]
        with pytest.raises(RequestFailed):
            gather(stream, texts)
        assert texts == [text_of(model, [5]), "", text_of(model, [6])]
        assert list(stream) == []
    assert_nothing_owned(engine)


def test_a_tokenizer_that_raises_ends_its_stream_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "autodeploy")

    class Broken(LetterTokenizer):
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
            raise KeyError("broken")

    engine = make_engine(HashModel(page_size=4), tokenizer=Broken())
    with pytest.raises(RequestFailed, match="the tokenizer raised KeyError"):
        list(stream_of(engine, [5], max_tokens=40))
    assert engine.stats.num_steps < 5
    assert_nothing_owned(engine)


def test_checks_come_before_the_first_piece_is_asked_for(llm: ad.LLM) -> None:
    with pytest.raises(OptionError):
        llm.stream([5, -1])
    with pytest.raises(RequestTooLong):
        llm.stream_many([[5] * 10_000])
    with pytest.raises(OptionError):
        llm.stream_many([[5]], {"max_tokens": 5})  # type: ignore[arg-type]


def test_an_interrupt_in_a_step_leaves_nothing() -> None:
    model, engine = hash_engine()
    step = engine._step

    def interrupted(*inputs: Any) -> Any:
        raise KeyboardInterrupt

    waiting = engine.add([9], SamplingParams(5))
    for ask in (lambda: engine.run(engine.make_requests([[1]], [GREEDY])), lambda: list(stream_of(engine, [1]))):
        engine._step = interrupted
        with pytest.raises(KeyboardInterrupt):
            ask()
        engine._step = step
        assert [*engine._scheduler.waiting, *engine._scheduler.running, *engine._arriving] == [waiting]
        assert_nothing_owned(engine)
    engine.run([])
    while engine.has_work:
        engine.step()
    assert waiting.token_ids == model.expected([9], 5)
