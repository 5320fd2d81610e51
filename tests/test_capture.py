"""Captured decode steps, with graphs that run on a CPU; and caches in which everything that nobody owns is NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_graphs import OpGraphs, WorkGraphs
from hash_model import HashModel, assert_nothing_owned, make_engine, run
from poison import by_head, by_token, poison_each_step
from test_engine import MAX_TOKENS, PROMPTS
from tiny_models import tiny
from torch import Tensor

import autodeploy as ad
from autodeploy.errors import CaptureError
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS
from autodeploy.metadata.nest import Nested
from autodeploy.runtime.buckets import StepSizes
from autodeploy.runtime.capture import CapturedStep
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.requests import SamplingParams
from autodeploy.runtime.staging import Link, Staging


class Affine:
    """The best token is token + query_len; adds 1 to the cache at each row's page. Counts its calls in Python."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, layout: Tensor, cache: Tensor) -> Tensor:
        self.num_calls += 1
        cache[layout[:, NUM_FIXED_COLUMNS].long()] += 1
        return torch.nn.functional.one_hot((input_ids + layout[:, 0]).long(), 9).float()


def captured_affine(rows: int) -> tuple[CapturedStep, Affine, Nested, Tensor]:
    cache, step = torch.zeros(4), Affine()
    staging = Staging(Link(torch.device("cpu")), 8, 8, NUM_FIXED_COLUMNS + 1)
    captured = CapturedStep(step, staging, [cache], 8, OpGraphs())
    return captured, step, staging.arenas[staging.graph_arena()].view(rows, rows, NUM_FIXED_COLUMNS + 1), cache


def test_a_replay_copies_the_arena_and_runs_no_python() -> None:
    captured, step, nested, _ = captured_affine(2)
    for tokens in ([3, 5], [1, 7]):
        nested.buffer.zero_()
        nested.input_ids[:] = torch.tensor(tokens)
        nested.layout[:, 0] = 1
        logits, best = captured(StepSizes(2, 2, 1), nested)
        assert best.tolist() == [token + 1 for token in tokens]
        assert logits.argmax(-1).tolist() == best.tolist()
    assert step.num_calls == 2, "one to warm up, one to record"
    assert captured.num_captures == 1


def test_a_capture_touches_only_scratch_and_runs_the_step_once() -> None:
    captured, _, nested, cache = captured_affine(2)
    nested.layout[:, NUM_FIXED_COLUMNS] = torch.tensor([2, 3])
    captured(StepSizes(2, 2, 1), nested)
    assert cache[1:].tolist() == [0, 1, 1]


def make_captured_engine(model: HashModel, graphs: WorkGraphs, **options: Any) -> Engine:
    return make_engine(model, graphs=graphs, max_num_seqs=6, **options)


def test_tokens_are_those_of_the_model_and_each_bucket_is_captured_once() -> None:
    model, graphs = HashModel(page_size=4), WorkGraphs()
    engine = make_captured_engine(model, graphs)
    for _ in range(2):
        requests = engine.add_many(PROMPTS, [SamplingParams(max_tokens=count) for count in MAX_TOKENS])
        run(engine)
        for request, prompt, count in zip(requests, PROMPTS, MAX_TOKENS, strict=True):
            assert request.token_ids == model.expected(prompt, count)
    assert_nothing_owned(engine)
    # 6 sequences at most: buckets of 6, 4 and 2 rows; the model's 16 pages are fewer than the smallest bucket.
    assert graphs.num_warm_ups == graphs.num_records == 3
    assert 0 < graphs.num_replays < engine.stats.num_steps


def test_a_request_that_draws_reads_the_logits_of_the_replay() -> None:
    params = [SamplingParams(max_tokens=6, temperature=5.0, seed=seed) for seed in range(4)]
    answers = []
    for engine in (make_engine(HashModel(4)), make_captured_engine(HashModel(4), WorkGraphs())):
        requests = engine.add_many(PROMPTS[:4], params)
        run(engine)
        answers.append([request.token_ids for request in requests])
    assert answers[0] == answers[1]


class FailingGraphs(WorkGraphs):
    def record(self, work: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_captured_is_refused_and_loses_nothing() -> None:
    model = HashModel(page_size=4)
    engine = make_captured_engine(model, FailingGraphs())
    request = engine.add(PROMPTS[0], SamplingParams(max_tokens=5))
    engine.step()
    with pytest.raises(CaptureError, match=r"not permitted when stream is capturing\n.*cuda_graphs=False"):
        engine.step()
    assert_nothing_owned(engine)
    assert request.token_ids == model.expected(PROMPTS[0], 1)
    engine._captured = None
    run(engine)
    assert request.token_ids == model.expected(PROMPTS[0], 5)


def answers_of(model_type: str, backend: str, graphs: WorkGraphs | None, *, poison: bool) -> list[tuple[int, ...]]:
    result = ad.apply(ad.trace(tiny(model_type)), backend=backend, page_size=4)
    assert result.layout_spec is not None
    engine = Engine(
        result.module,
        result.cache_specs,
        result.layout_spec,
        device=torch.device("cpu"),
        num_pages=(30,) * result.layout_spec.num_groups,
        max_model_len=64,
        max_num_seqs=5,
        max_num_tokens=16,
        graphs=graphs,
    )
    if poison:
        poison_each_step(engine, result.cache_specs, by_token if backend == "reference" else by_head)
    prompts = [[5] * 3, [6, 7], list(range(20, 41)), [9]]
    requests = [engine.add(prompt, SamplingParams(max_tokens=8, ignore_eos=True)) for prompt in prompts]
    run(engine)
    return [request.token_ids for request in requests]


@pytest.mark.parametrize("graphs", [None, OpGraphs], ids=["direct", "captured"])
@pytest.mark.parametrize(
    ("model_type", "backend"),
    [("llama", "reference"), ("gemma3_text", "reference"), ("gemma3_text", "sdpa"), ("lfm2", "auto")],
)
def test_what_nobody_owns_is_neither_read_nor_written(
    model_type: str, backend: str, graphs: type[OpGraphs] | None
) -> None:
    expected = answers_of(model_type, backend, None, poison=False)
    assert answers_of(model_type, backend, graphs and graphs(), poison=True) == expected
