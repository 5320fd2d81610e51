"""What find_attention leaves alone, and the reason it gives."""

from __future__ import annotations

import math

import pytest
import torch
from attention_graphs import HEADS, Form, export, tensors
from test_attention_forms import LOWEST, SCALE, causal, repeat
from torch import Tensor
from torch.nn import functional as F

from autodeploy.errors import NoAttentionFound
from passes import FindAttention


def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ repeat(k)[:, :, 1:].mT).softmax(-1) @ repeat(v)[:, :, 1:]


def cross_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat(k)[:, :, 1:], repeat(v)[:, :, 1:])


def dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ repeat(k).mT).softmax(-1), 0.1) @ repeat(v)


def weights_are_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ repeat(k).mT).softmax(-1)
    return weights @ repeat(v) + weights.sum(-1, keepdim=True)


def scale_from_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ repeat(k).mT * q.mean()).softmax(-1) @ repeat(v)


def multiplied_by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    scores = q @ repeat(k).mT * (1 + (index[:, None] - index).clamp(min=0))
    return scores.masked_fill(~causal(q.shape[2]), LOWEST).softmax(-1) @ repeat(v)


def masked_and_multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = causal(q.shape[2])
    return ((q @ repeat(k).mT).masked_fill(~seen, LOWEST) * seen.float()).softmax(-1) @ repeat(v)


def mask_is_not_low_enough(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(causal(q.shape[2]), q @ repeat(k).mT, -1000.0).softmax(-1) @ repeat(v)


def mask_before_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh((q @ repeat(k).mT).masked_fill(~causal(q.shape[2]), LOWEST))
    return scores.softmax(-1) @ repeat(v)


def sees_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=index[None, :] < index[:, None])


def mask_from_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=k[:, :1, :, 0].unsqueeze(2) > 0)


def bias_from_outside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=bias)


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ repeat(k).mT * SCALE).softmax(-2) @ repeat(v)


def sink_of_each_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q @ repeat(k).mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ repeat(v)


def not_a_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[..., :1] - repeat(k)[..., 0].unsqueeze(2)).abs().softmax(-1) @ repeat(v)


def query_written_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q + 1
    scores = q @ repeat(k).mT
    q.mul_(2)
    return scores.softmax(-1) @ repeat(v) + q


def scores_written_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeat(k).mT
    scores.masked_fill_(~causal(q.shape[2]), LOWEST)
    return scores.softmax(-1) @ repeat(v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhi", (q @ repeat(k).mT).softmax(-1), repeat(v))


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (cross, "of another length"),
        (cross_sdpa, "of another length"),
        (dropout, "has dropout"),
        (weights_are_returned, "has weights that are used elsewhere too"),
        (scale_from_data, "scales its scores by mean, which is not a constant"),
        (multiplied_by_distance, "multiplies its scores by add, which hides none of them for good"),
        (masked_and_multiplied, "multiplies its scores by to, which hides none of them for good"),
        (mask_is_not_low_enough, "replaces masked scores by -1000"),
        (mask_before_softcap, "before the softcap"),
        (sees_nothing, "hides everything from some query"),
        (mask_from_data, "depends on data, and may hide everything"),
        (bias_from_outside, "has a bias that may hide everything from some query"),
        (softmax_over_queries, "has a softmax over another dimension than the keys"),
        (sink_of_each_token, "has a further logit that is not one number per head"),
        (not_a_product, "weighs values by something other than queries times keys"),
        (einsum, "weighs values with an einsum that is no product of matrices"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refused(form: Form, reason: str) -> None:
    inputs = tensors(3, 7) if form is not bias_from_outside else (*tensors(3, 7), torch.zeros(1, HEADS, 7, 7))
    gm = export(form, inputs)
    graph = str(gm.graph)
    with pytest.raises(NoAttentionFound, match=reason):
        FindAttention().apply(gm)
    assert str(gm.graph) == graph


def test_a_repeat_in_another_order_is_not_taken_for_groups() -> None:
    """Heads 0, 1, 0, 1 instead of 0, 0, 1, 1: kept as they are repeated."""

    def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        return (q @ k.mT).masked_fill(~causal(q.shape[2]), -math.inf).softmax(-1) @ v

    gm = export(tiled, tensors(3, 7))
    inputs = tensors(2, 13)
    before = gm(*inputs)
    assert FindAttention().apply(gm) == 1
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), before, atol=1e-5, rtol=0)


def test_a_mask_that_only_looks_like_a_window_nearby() -> None:
    """Two blocks of 40 tokens: at short lengths nothing but causal."""

    def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = torch.arange(q.shape[2])
        seen = causal(q.shape[2]) & (index[:, None] // 40 == index // 40)
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=seen)

    gm = export(blocks, tensors(3, 7))
    inputs = tensors(2, 50)
    before = gm(*inputs)
    assert FindAttention().apply(gm) == 1
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", [query_written_in_place, scores_written_in_place])
def test_writes_that_nobody_can_tell_are_no_matter(form: Form) -> None:
    gm = export(form, tensors(3, 7))
    inputs = tensors(2, 13)
    before = gm(*inputs)
    assert FindAttention().apply(gm) == 1
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), before, atol=1e-5, rtol=0)  # float32, values of size one
