"""Attention as other projects write it: each spelling of each part, the others drawn at random, becomes canonical."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from attention_cases import HIDDEN_SIZE, SPELLINGS, Case, Written, is_written
from attention_graphs import export, reduced
from torch import Tensor, fx

from autodeploy.errors import NoAttentionFound
from autodeploy.graph.meta import VALUE
from passes import FindAttention

# Of outputs of size one: another order of sums in float32; in 16 bits, scores that a model rounds and the op does not.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def _cases() -> Iterator[Case]:
    draw = random.Random(1)
    for name, spellings in SPELLINGS.items():
        for spelling in spellings:
            case = None
            while case is None or not is_written(case):
                drawn = {part: draw.choice(others) for part, others in SPELLINGS.items()}
                case = Case(**drawn | {name: spelling})
            yield case


def _exported(case: Case) -> tuple[fx.GraphModule, Tensor, Tensor]:
    """The graph of `case`, an input of another size than it was exported with, and what the graph gives for that."""
    generator = torch.Generator().manual_seed(0)
    first, other = (torch.randn(*size, HIDDEN_SIZE, generator=generator).to(case.dtype) for size in ((3, 7), (2, 13)))
    model = Written(case)
    gm = export(model, (first,), max_length=60)
    with torch.no_grad():
        return gm, other, model(other)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_case(case: Case) -> None:
    gm, inputs, expected = _exported(case)
    node = reduced(gm)
    with torch.no_grad():
        torch.testing.assert_close(gm(inputs), expected, atol=TOLERANCES[case.dtype], rtol=0)
    is_causal = case.mask != "none" or case.product == "sdpa_causal"
    assert (node.kwargs["causal"], str(node.kwargs["span"]).partition("_")[0]) == (is_causal, case.span)
    assert VALUE.of(node.args[1]).shape[1] == case.num_kv_heads  # type: ignore[union-attr]
    assert [node.args[3] is not None, node.args[4]] == [case.sinks, None]
    assert (node.kwargs["softcap"] is not None) == case.softcap


@torch.library.custom_op("tests::attention_of_another", mutates_args=())
def attention_of_another(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


@attention_of_another.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


def test_an_attention_that_is_one_unknown_op_is_a_near_miss() -> None:
    gm = export(lambda q: attention_of_another(q, q + 1, q * 2), (torch.randn(3, 4, 7, 8),))
    with pytest.raises(NoAttentionFound, match="may be an attention: tests"):
        FindAttention().apply(gm)


def test_exponentials_over_more_than_their_sum_are_a_near_miss() -> None:
    def with_one(q: Tensor) -> Tensor:
        weights = (q @ q.mT).exp()
        return weights / (1 + weights.sum(-1, keepdim=True)) @ q

    with pytest.raises(NoAttentionFound, match="divides exponentials of its scores by something other than their sum"):
        FindAttention().apply(export(with_one, (torch.randn(3, 4, 7, 8),)))
