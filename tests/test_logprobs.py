"""Log probabilities: those of the model, whatever the batch, and whatever came between."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fake_graphs import WorkGraphs
from hash_model import EMBEDDING, NAN, VOCABULARY, HashModel, assert_nothing_owned, make_engine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from spans import SPANS
from tiny_models import VOCAB_SIZE, tiny

import autodeploy as ad
from autodeploy.errors import OptionError, RequestTooLong
from autodeploy.runtime import engine as engine_module
from autodeploy.runtime.logprobs import Logprobs, Scores
from autodeploy.runtime.requests import Request, SamplingParams
from autodeploy.runtime.stream import Stream, TextStream

# Of the hash model's logits, which are 1 for its choice and 0 for all others.
BEST = 1 - math.log(math.e + VOCABULARY - 1)
OTHER = BEST - 1
TOLERANCE = 1e-4  # of float32 logits, between our order of sums and that of transformers' eager attention


def check_hash(model: HashModel, request: Request) -> None:
    """Each token has the log probability that the model gives it behind those before it, and so has the best."""
    output, tokens = request.output(), [*request.prompt_token_ids, *request.token_ids]
    for found, k, first in (
        (output.prompt_logprobs, request.params.prompt_logprobs, 1),
        (output.logprobs, request.params.logprobs, len(request.prompt_token_ids)),
    ):
        assert (found is None) == (k is None)
        for place, each in enumerate(found or (), start=first):
            (best,) = model.expected(tokens[:place], 1)
            assert each.token_id == tokens[place]
            assert each.logprob == pytest.approx(BEST if each.token_id == best else OTHER)
            assert len(each.top) == k
            if k:
                assert each.top[0] == (best, pytest.approx(BEST))
                assert [logprob for _, logprob in each.top[1:]] == pytest.approx([OTHER] * (k - 1))
    if request.params.logprobs is not None:
        assert len(output.logprobs or ()) == len(request.token_ids)
    if request.params.prompt_logprobs is not None and request.token_ids:
        assert len(output.prompt_logprobs or ()) == len(request.prompt_token_ids) - 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_workload_is_scored_as_the_model_scores_it(data: st.DataObject) -> None:
    """Chunked, preempted, cancelled, repeated after an error, greedy or drawn, from a graph or not."""
    model = HashModel(data.draw(st.integers(1, 5)), data.draw(st.sampled_from(SPANS[1:])))
    max_num_seqs = data.draw(st.integers(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_MOST_SCORED", data.draw(st.sampled_from([1, 3, 256])))
        engine = make_engine(
            model,
            num_pages=(data.draw(st.integers(2, 12)), data.draw(st.integers(2, 8))),
            max_num_seqs=max_num_seqs,
            max_num_tokens=data.draw(st.integers(max_num_seqs, 16)),
            graphs=WorkGraphs() if data.draw(st.booleans()) else None,
        )
    model.fail_at = data.draw(st.integers(0, 20))
    requests: list[Request] = []
    for prompt in data.draw(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), max_size=6)):
        params = SamplingParams(
            max_tokens=data.draw(st.integers(1, 8)),
            temperature=data.draw(st.sampled_from([0.0, 5.0])),
            logprobs=data.draw(st.sampled_from([None, 0, 1, 3])),
            prompt_logprobs=data.draw(st.sampled_from([None, 0, 2])),
        )
        try:
            requests.append(engine.add(prompt, params))
        except RequestTooLong:
            continue
        engine.step()
    for request in data.draw(st.lists(st.sampled_from(requests), max_size=2)) if requests else []:
        engine.cancel(request)
    run(engine)
    assert_nothing_owned(engine)
    for request in requests:
        check_hash(model, request)
        if request.finish_reason != "error" and request.params.temperature == 0:
            expected = model.expected(list(request.prompt_token_ids), request.params.max_tokens)
            assert request.token_ids == expected[: len(request.token_ids)]


def test_preempted_requests_keep_what_was_scored() -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model, num_pages=(11, 40), max_num_tokens=7)
    prompts = [list(range(30)), [7] * 11, list(range(20))]
    requests = engine.add_many(prompts, [SamplingParams(max_tokens=9, logprobs=2, prompt_logprobs=2)] * 3)
    run(engine)
    assert engine.stats.num_preemptions > 0
    for request in requests:
        check_hash(model, request)


def eager(model: Any, tokens: list[int]) -> torch.Tensor:
    """transformers' log probabilities [T, V] behind each token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def check_against(expected_NV: torch.Tensor, token_ids: list[int], found: Logprobs | None, k: int) -> None:
    assert found is not None
    assert found.token_ids.tolist() == token_ids
    own = expected_NV.gather(1, torch.tensor(token_ids, dtype=torch.int64)[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(found.own), own, atol=TOLERANCE, rtol=0)
    best = expected_NV.topk(k, dim=-1).values
    torch.testing.assert_close(torch.from_numpy(found.top), best, atol=TOLERANCE, rtol=0)
    at_ids = expected_NV.gather(1, torch.from_numpy(found.top_ids).long())
    torch.testing.assert_close(at_ids, best, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "lfm2"])
def test_equal_to_transformers(model_type: str, temperature: float) -> None:
    """On a ragged batch, prompts in chunks of at most 16 tokens, soft-capped logits too; before temperature."""
    model = tiny(model_type)
    llm = ad.LLM(model, compile=False, max_num_seqs=3, max_num_tokens=16, page_size=4)
    prompts = [[5, 6, 7], [9], [(7 * i) % VOCAB_SIZE for i in range(45)]]
    params = SamplingParams(6, temperature, seed=1, ignore_eos=True, logprobs=3, prompt_logprobs=4)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        tokens = [*prompt, *output.token_ids]
        expected = eager(model, tokens)
        check_against(expected[: len(prompt) - 1], prompt[1:], output.prompt_logprobs, 4)
        check_against(expected[len(prompt) - 1 : -1], list(output.token_ids), output.logprobs, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_compiled_steps_score_prompts() -> None:
    model = tiny("llama")
    prompt = [(5 * i) % VOCAB_SIZE for i in range(20)]
    (output,) = ad.LLM(model).generate([prompt], SamplingParams(1, prompt_logprobs=2))
    check_against(eager(model, prompt)[:-1], prompt[1:], output.prompt_logprobs, 2)


def test_a_stream_has_them_as_it_grows() -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model)
    requests = engine.make_requests([[1, 2, 3]], [SamplingParams(max_tokens=5, logprobs=1, prompt_logprobs=1)])
    stream = TextStream(Stream(engine, requests))
    assert (stream.output().logprobs, len(stream.output().prompt_logprobs or ())) == (
        Scores(0, 1).of(requests[0].tokens),
        0,
    )
    engine.submit(requests)
    engine.step()
    assert len(stream.output().logprobs or ()) == 1
    assert len(stream.output().prompt_logprobs or ()) == 2
    list(stream)
    assert stream.output() == requests[0].output()
    check_hash(model, requests[0])


def test_a_token_that_is_none_has_no_log_probability() -> None:
    engine = make_engine(HashModel(page_size=4))
    request = engine.add([1, NAN], SamplingParams(max_tokens=3, logprobs=1, prompt_logprobs=1))
    run(engine)
    assert request.finish_reason == "error"
    assert (len(request.output().logprobs or ()), request.output().token_ids) == (0, ())


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [True, -1, 1.0, "2", 2**31])
def test_a_wrong_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"{name} is .*\n.*SamplingParams\n.*None or an integer in \[0, "):
        SamplingParams(**{name: value})


def test_more_than_the_vocabulary_is_refused_before_anything_runs() -> None:
    engine = make_engine(HashModel(page_size=4))
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(OptionError, match=rf"^{name} is {EMBEDDING + 1}, the model has {EMBEDDING} tokens"):
            engine.add_many([[1], [2]], [SamplingParams(5), SamplingParams(5, **{name: EMBEDDING + 1})])
    assert not engine.has_work


def test_more_than_memory_holds_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodeploy.runtime.scoring.free_memory", lambda _: 10**6)
    engine = make_engine(HashModel(page_size=4), vocab_size=10**6)
    with pytest.raises(
        OptionError, match=r"would take 0\.2 GB of memory, 0\.0 GB are free\n.*1 requests with up to 500000"
    ):
        engine.add([1] * 20, SamplingParams(max_tokens=1, prompt_logprobs=500_000))
    engine.add([1] * 20, SamplingParams(max_tokens=1, prompt_logprobs=5))


def test_nobody_asked_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "score", None)
    engine = make_engine(HashModel(page_size=4))
    request = engine.add([1, 2], SamplingParams(max_tokens=3))
    run(engine)
    output = request.output()
    assert (output.logprobs, output.prompt_logprobs, request.scores) == (None, None, None)


def test_read_by_index_and_by_slice() -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model)
    request = engine.add([1, 2], SamplingParams(max_tokens=4, logprobs=2))
    run(engine)
    found = request.output().logprobs
    assert found is not None
    assert found[1:3] == found[1:3] != found[:2]
    assert found[-1] == list(found)[3]
    assert repr(found).startswith("Logprobs of 4 tokens, sum -")
