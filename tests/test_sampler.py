"""Sampling: the right distribution, and a request's choices are its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeploy.errors import OptionError
from autodeploy.runtime.requests import Request, SamplingParams, make_request
from autodeploy.runtime.sampler import best_of_parts, best_tokens, sample_tokens

VOCABULARY = 12


def request_with(**params: float | None) -> Request:
    return make_request(np.ones(1, dtype=np.int32), SamplingParams(**params), None)


def draws(logits: torch.Tensor, count: int = 400, **params: float | None) -> torch.Tensor:
    """How often each token is chosen."""
    requests = [request_with(seed=seed, **params) for seed in range(count)]
    tokens, _ = sample_tokens(logits.expand(count, -1), range(count), requests)
    return tokens.bincount(minlength=logits.numel())


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.randn(VOCABULARY)
    expected = torch.softmax(logits / 1.5, dim=0)
    counts = draws(logits, count=20000, temperature=1.5)
    # Five standard deviations of a binomial count.
    assert ((counts / 20000 - expected).abs() < 5 * (expected / 20000).sqrt()).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, VOCABULARY), st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]))
def test_only_kept_tokens_are_drawn(seed: int, top_k: int, top_p: float) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    order = logits.argsort(descending=True).tolist()[: top_k or VOCABULARY]
    weights = torch.softmax(logits[order].double(), dim=0)
    kept = [token for rank, token in enumerate(order) if top_p == 1 or weights[:rank].sum() < top_p]
    counts = draws(logits, temperature=1.0, top_k=top_k, top_p=top_p)
    assert set(counts.nonzero().flatten().tolist()) <= set(kept)
    assert counts[order[0]] > 0


def test_a_request_draws_the_same_alone_and_among_others() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(4, VOCABULARY, generator=generator) for _ in range(20)]
    alone, among = request_with(temperature=1.0, seed=5), request_with(temperature=1.0, seed=5)
    others = [request_with(temperature=0.3, top_k=2, top_p=0.5), request_with(temperature=2.0)]
    for step_logits in logits:
        expected, _ = sample_tokens(step_logits[2:3], [0], [alone])
        tokens, copied = sample_tokens(step_logits, [0, 2, 3], [others[0], among, others[1]])
        assert tokens[1] == expected[0]
        assert copied > 0


def test_without_a_seed_the_default_generator_decides() -> None:
    logits = torch.zeros(1, 1000)
    tokens = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tokens.append(sample_tokens(logits, [0], [request_with(temperature=1.0)])[0].tolist())
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize("temperature", [1e-300, 1e-8])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([300.0, 301.0, -400.0])
    assert draws(logits, temperature=temperature).tolist() == [0, 400, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.0},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": ("a", "")},
        {"stop": (1,)},
    ],
)
def test_params_outside_their_range_are_refused(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(OptionError, match=rf"^{name} is "):
        SamplingParams(**wrong)


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=24, max_size=24), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4, 8, 24]),
)
def test_the_best_of_parts_is_the_best(logits: list[list[int]], part: int) -> None:
    """The first of the best, of which there are many here."""
    logits_SV = torch.tensor(logits, dtype=torch.bfloat16)
    first = [row.index(max(row)) for row in logits]
    assert best_of_parts(logits_SV, part).tolist() == best_tokens(logits_SV).tolist() == first
