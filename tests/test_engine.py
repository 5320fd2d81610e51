"""The engine, fed by a model in plain Python whose every token depends on all that it reads back from its caches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hash_model import (
    VOCABULARY,
    HashModel,
    LetterTokenizer,
    assert_nothing_owned,
    generate,
    make_engine,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from spans import SPANS

from autodeploy.errors import OptionError, RequestTooLong
from autodeploy.runtime.buckets import captured_sizes, padded_sizes
from autodeploy.runtime.caches import default_num_pages
from autodeploy.runtime.requests import Request, RequestOutput, SamplingParams

PROMPTS = [[1, 2, 3], [4], list(range(30)), [7] * 11, [9, 8], list(range(20))]
MAX_TOKENS = [12, 20, 9, 15, 1, 8]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_seqs": 1}, id="one at a time"),
        pytest.param({"max_num_seqs": 6}, id="batched"),
        pytest.param({"max_num_seqs": 2, "max_num_tokens": 5}, id="chunked"),
        pytest.param({"num_pages": (11, 40), "max_num_tokens": 7}, id="preempted"),
        pytest.param({"num_pages": (40, 5), "max_num_tokens": 7}, id="window pages freed and reused"),
    ],
)
def test_tokens_do_not_depend_on_how_they_were_batched(options: dict) -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model, **options)
    outputs = generate(engine, PROMPTS, MAX_TOKENS)
    for output, prompt, count in zip(outputs, PROMPTS, MAX_TOKENS, strict=True):
        assert output == RequestOutput(model.expected(prompt, count), "", "length", tuple(prompt))
    assert (engine.stats.num_preemptions > 0) == (options.get("num_pages") is not None)
    assert all(num_tokens >= 2 and num_sequences >= 2 for num_tokens, num_sequences in model.sizes)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_workload_on_any_pool_gives_the_tokens_of_the_model(data: st.DataObject) -> None:
    model = HashModel(data.draw(st.integers(1, 5)), data.draw(st.sampled_from(SPANS[1:])))
    max_num_seqs = data.draw(st.integers(1, 4))
    engine = make_engine(
        model,
        num_pages=(data.draw(st.integers(2, 12)), data.draw(st.integers(2, 8))),
        max_num_seqs=max_num_seqs,
        max_num_tokens=data.draw(st.integers(max_num_seqs, 16)),
    )
    model.fail_at = data.draw(st.integers(0, 20))
    prompts = data.draw(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), max_size=6))
    requests: list[Request] = []
    for prompt in prompts:
        params = SamplingParams(max_tokens=data.draw(st.integers(1, 8)))
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
        expected = model.expected(list(request.prompt_token_ids), request.params.max_tokens)
        if request.finish_reason in ("cancelled", "error"):
            expected = expected[: len(request.token_ids)]
        assert request.token_ids == expected
    # The one step that raises is repeated, unless it was of one request.
    assert sum(request.error is not None for request in requests) <= 1


def test_cancel_frees_at_once_and_keeps_the_others() -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model, max_num_seqs=2)
    running, other, waiting = engine.add_many(PROMPTS[:3], [SamplingParams(max_tokens=6)] * 3)
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    engine.cancel(running)
    assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    assert running.token_ids == model.expected(PROMPTS[0], 1)
    run(engine)
    assert (other.token_ids, waiting.token_ids) == (model.expected(PROMPTS[1], 6), ())
    assert_nothing_owned(engine)


def test_a_list_with_one_request_too_long_adds_none() -> None:
    engine = make_engine(HashModel(page_size=4))
    with pytest.raises(RequestTooLong, match="exceed the model's 64"):
        engine.add_many([[1], [2] * 60], [SamplingParams()] * 2)
    with pytest.raises(RequestTooLong, match="max_tokens 1000000000000 exceed"):
        engine.add([1], SamplingParams(max_tokens=10**12))
    assert not engine.has_work


def test_eos_ends_a_request_unless_ignored() -> None:
    model = HashModel(page_size=4)
    tokens = model.expected([5, 6], 10)
    eos = tokens[4]
    stops_at = tokens.index(eos) + 1
    engine = make_engine(model, eos_token_ids=[eos])
    stopping = engine.add([5, 6], SamplingParams(max_tokens=10))
    going_on = engine.add([5, 6], SamplingParams(max_tokens=10, ignore_eos=True))
    run(engine)
    assert (stopping.token_ids, stopping.finish_reason) == (tokens[:stops_at], "stop")
    assert (going_on.token_ids, going_on.finish_reason) == (tokens, "length")


def test_text_streams_and_ends_before_a_stop_string() -> None:
    model, tokenizer = HashModel(page_size=4), LetterTokenizer()
    text = tokenizer.decode(list(model.expected([5, 6], 12)), skip_special_tokens=True)
    engine = make_engine(model, tokenizer=tokenizer)
    whole = engine.add([5, 6], SamplingParams(max_tokens=12))
    cut = engine.add([5, 6], SamplingParams(max_tokens=12, stop=text[6:9]))
    pieces = {whole: "", cut: ""}
    while engine.has_work:
        for output in engine.step():
            pieces[output.request] += output.text
    assert pieces[whole] == whole.text == text
    assert pieces[cut] == cut.text == text[: text.index(text[6:9])]
    assert cut.finish_reason == "stop"


def test_stop_strings_need_a_tokenizer() -> None:
    engine = make_engine(HashModel(page_size=4))
    with pytest.raises(OptionError, match="stop strings without a tokenizer"):
        engine.add([1], SamplingParams(max_tokens=1, stop="x"))


def test_one_copy_per_step_and_counts_that_add_up() -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model, max_num_seqs=6)
    generate(engine, PROMPTS, MAX_TOKENS)
    stats = engine.stats
    assert stats.num_steps == stats.num_host_to_device_copies == len(model.sizes)
    assert stats.num_tokens == sum(map(len, PROMPTS)) + sum(MAX_TOKENS) - len(PROMPTS)
    assert stats.host_to_device_bytes > 0
    assert stats.host_seconds > 0


def test_buckets_are_never_small_grow_coarsely_and_stay_below_the_table() -> None:
    sizes = [padded_sizes(1, 1, pages, 1000).pages_per_sequence for pages in range(1, 25)]
    assert sizes == [2, 2, 3, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, *[24] * 8]
    assert padded_sizes(1, 1, 1, 2) == (2, 2, 2)
    assert padded_sizes(2, 1, 1, 2) == (2, 2, 2), "sizes that coincide say nothing"
    assert padded_sizes(7, 5, 40, 45) == (7, 5, 45)
    buckets = sorted({padded_sizes(2, 2, pages, 5000).pages_per_sequence for pages in range(1, 5000)})
    assert all(after <= 1.5 * before for before, after in pairwise(buckets))


def test_captured_buckets_are_few_and_hold_what_they_are_for() -> None:
    rows = [captured_sizes(count, 1, 33, 99).num_sequences for count in range(1, 34)]
    assert rows == [2, 2, 4, 4, *[8] * 4, *[16] * 8, *[24] * 8, *[32] * 8, 33]
    pages = [captured_sizes(1, count, 8, 300).pages_per_sequence for count in (1, 64, 65, 129, 257, 300)]
    assert pages == [64, 64, 128, 256, 300, 300]
    assert captured_sizes(1, 1, 1, 2) == (2, 2, 2)


def test_default_pool_holds_all_sequences_or_what_memory_buys() -> None:
    model = HashModel(page_size=4)
    sizes = {"max_model_len": 64, "max_num_seqs": 4, "max_num_tokens": 8}
    # 16 pages for 64 tokens; a window of 6 touches 3 and a chunk of 8 adds 2.
    assert default_num_pages(model.cache_specs, model.spec, **sizes, memory_bytes=10**6) == (65, 21)
    # 16 bytes a page in each group, 20 bytes of state: half of (64 + 20) pages, and two of scratch.
    assert default_num_pages(model.cache_specs, model.spec, **sizes, memory_bytes=20 + 16 * (42 + 2)) == (33, 11)
    with pytest.raises(OptionError, match="do not hold one sequence of 64 tokens"):
        default_num_pages(model.cache_specs, model.spec, **sizes, memory_bytes=300)


def test_greedy_requests_beside_drawing_ones_take_the_best() -> None:
    model = HashModel(page_size=4)
    engine = make_engine(model, max_num_seqs=3)
    params = [SamplingParams(max_tokens=6, temperature=temperature) for temperature in (5.0, 0.0, 5.0)]
    _, greedy, _ = engine.add_many(PROMPTS[:3], params)
    run(engine)
    assert greedy.token_ids == model.expected(PROMPTS[1], 6)
    assert engine.stats.num_host_to_device_copies == 2 * engine.stats.num_steps


def test_requests_sampled_together_draw_what_they_draw_alone() -> None:
    params = [SamplingParams(max_tokens=6, temperature=5.0, seed=seed) for seed in range(4)]
    prompts = [np.array(prompt) for prompt in PROMPTS[:4]]
    together = make_engine(HashModel(page_size=4))
    requests = together.add_many(prompts, params)
    run(together)
    alone = make_engine(HashModel(page_size=4), max_num_seqs=1)
    assert [request.token_ids for request in alone.add_many(prompts, params) if not run(alone)] == [
        request.token_ids for request in requests
    ]
