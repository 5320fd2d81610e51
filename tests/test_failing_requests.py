"""A request that fails ends alone, with a typed error, and the engine goes on as if it had never been."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hash_model import (
    INFINITY,
    MINUS_INFINITY,
    NAN,
    RAISES,
    VOCABULARY,
    HashModel,
    LetterTokenizer,
    StepFailed,
    assert_nothing_owned,
    make_engine,
    run,
)
from test_engine import MAX_TOKENS, PROMPTS

from autodeploy.errors import RequestFailed
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.requests import Request, SamplingParams
from autodeploy.runtime.sampler import NO_TOKEN, best_of_parts, best_tokens, sample_tokens

BAD_PROMPTS = {
    "raises": [3, RAISES],
    "raises in the second of its chunks": [1] * 20 + [RAISES] + [2] * 5,
    "nan": [1, NAN],
    "all -inf": [2, MINUS_INFINITY],
    "inf": [INFINITY],
}
ENGINES: dict[str, dict[str, Any]] = {
    "roomy": {"max_num_seqs": 12},
    "one at a time": {"max_num_seqs": 1},
    "chunked": {"max_num_seqs": 3, "max_num_tokens": 5},
    "preempted": {"num_pages": (11, 40), "max_num_tokens": 7},
}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "autodeploy")


def check_good(model: HashModel, requests: list[Request]) -> None:
    for request, prompt, count in zip(requests, PROMPTS, MAX_TOKENS, strict=True):
        assert (request.token_ids, request.error) == (model.expected(prompt, count), None)


def answers_are_right(engine: Engine, model: HashModel) -> None:
    run(engine)
    assert_nothing_owned(engine)
    requests = engine.add_many(PROMPTS, [SamplingParams(max_tokens=count) for count in MAX_TOKENS])
    run(engine)
    check_good(model, requests)
    assert_nothing_owned(engine)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("bad", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_only_the_bad_request_ends(bad: list[int], options: dict, temperature: float) -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model, **options)
    good = engine.add_many(PROMPTS, [SamplingParams(max_tokens=count) for count in MAX_TOKENS])
    for _ in range(3):
        engine.step()
    params = SamplingParams(max_tokens=6, temperature=temperature)
    failing = engine.add_many([bad, bad], [params, params])
    run(engine)
    for request in failing:
        output = request.output()
        assert (output.token_ids, output.finish_reason) == ((), "error")
        assert isinstance(output.error, RequestFailed)
        assert "prompt tokens" in output.error.where
        assert isinstance(output.error.__cause__, StepFailed) == (RAISES in bad)
    check_good(model, good)
    answers_are_right(engine, model)


def test_a_step_that_raises_once_costs_nobody_anything() -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model)
    requests = engine.add_many(PROMPTS, [SamplingParams(max_tokens=count) for count in MAX_TOKENS])
    for _ in range(3):
        engine.step()
    model.fail_at = len(model.sizes) + 1
    run(engine)
    check_good(model, requests)
    assert engine.stats.num_failed_steps == 1
    assert [size[1] for size in model.sizes[4:8]] == [2] * 4, "each alone, in steps of the smallest size"


def test_a_step_that_always_raises_ends_every_request() -> None:
    def step(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    model = HashModel(page_size=4)
    engine = make_engine(model)
    engine._step = step
    requests = engine.add_many(PROMPTS, [SamplingParams(max_tokens=5)] * len(PROMPTS))
    run(engine, limit=2 * len(PROMPTS))
    for request in requests:
        assert "RuntimeError: the device is gone" in str(request.error)
    engine._step = model
    answers_are_right(engine, model)


def test_cancelling_those_that_run_alone() -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model)
    requests = engine.add_many(PROMPTS[:4], [SamplingParams(max_tokens=5)] * 4)
    model.fail_at = 1
    engine.step()
    engine.cancel(requests[3], requests[1])
    run(engine)
    for place in (0, 2):
        assert requests[place].token_ids == model.expected(PROMPTS[place], 5)
    answers_are_right(engine, model)


class RaisingTokenizer(LetterTokenizer):
    """Knows no "d"."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        if 3 in [token % 26 for token in token_ids]:
            raise KeyError("d")
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("stop", [(), ("never there",)], ids=["no stop string", "stop string"])
def test_a_tokenizer_that_raises_ends_its_request_only(stop: tuple[str, ...]) -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model, tokenizer=RaisingTokenizer())
    prompts = [[index] for index in range(12)]
    requests = engine.make_requests(prompts, [SamplingParams(max_tokens=5, stop=stop)] * len(prompts))
    outputs = engine.run(requests)
    expected = [model.expected(prompt, 5) for prompt in prompts]
    fails = [any(token % 26 == 3 for token in tokens) for tokens in expected]
    assert any(fails)
    assert not all(fails)
    for output, tokens, failed in zip(outputs, expected, fails, strict=True):
        assert (output.finish_reason == "error") == failed == isinstance(output.error, RequestFailed)
        text = LetterTokenizer().decode(list(tokens), skip_special_tokens=True)
        assert output.text == text.split("d")[0]
        assert failed or output.token_ids == tokens
    answers_are_right(engine, model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_token_of_logits_that_are_no_numbers(bad: float) -> None:
    params = [SamplingParams(1, temperature=1.0, top_k=k, top_p=p) for k in (0, 3) for p in (1.0, 0.5)]
    model = HashModel(page_size=4)
    requests = make_engine(model).make_requests([[1]] * 4, params)
    for width in (16, 64, 96):
        logits = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
        logits[2] = bad
        if bad == torch.inf:
            logits[2, 1:] = 0
        expected = logits.argmax(-1).tolist()
        for best in (best_tokens(logits), best_of_parts(logits, 8), best_of_parts(logits, width)):
            assert best.tolist() == [*expected[:2], NO_TOKEN, expected[3]]
        assert sample_tokens(logits, [2] * 4, requests)[0].tolist() == [NO_TOKEN] * 4
        assert all(0 <= token < width for token in sample_tokens(logits, [0, 1, 3, 3], requests)[0].tolist())


def test_some_logits_of_minus_infinity_are_no_error() -> None:
    logits = torch.full((2, VOCABULARY), -torch.inf)
    logits[:, 5] = 0
    (request,) = make_engine(HashModel(page_size=4)).make_requests([[1]], [SamplingParams(1, temperature=1.0)])
    assert best_tokens(logits).tolist() == [5, 5]
    assert sample_tokens(logits, [1], [request])[0].tolist() == [5]
