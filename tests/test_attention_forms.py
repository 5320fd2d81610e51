"""Each form of attention that find_attention knows: same numbers at other sizes, and everything that was asked kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_graphs import HEAD_DIM, HEADS, KV_HEADS, Form, export, reduced, tensors
from torch import Tensor
from torch.nn import functional as F

from autodeploy.graph.meta import VALUE

TOLERANCE = 1e-5  # float32, values of size one: another order of summation, scales applied at another place
LOWEST = torch.finfo(torch.float32).min
SCALE = HEAD_DIM**-0.5
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def causal(length: int, window: int | None = None) -> Tensor:
    """[S, S] bool, in the ops of a model."""
    index = torch.arange(length)
    seen = index[None, :] <= index[:, None]
    return seen if window is None else seen & (index[None, :] > index[:, None] - window)


def repeat(key: Tensor) -> Tensor:
    batch, heads, length, dim = key.shape
    return key[:, :, None].expand(batch, heads, HEADS // heads, length, dim).reshape(batch, HEADS, length, dim)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, repeat(k).transpose(2, 3)) * SCALE
    scores = scores + torch.zeros(()).masked_fill(~causal(q.shape[2]), LOWEST)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ repeat(v)


def scale_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * math.sqrt(SCALE)) @ (repeat(k) * math.sqrt(SCALE)).transpose(-1, -2)
    return scores.masked_fill(~causal(q.shape[2]), -math.inf).softmax(-1) @ repeat(v)


def scale_divides_the_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q / 4) @ repeat(k).transpose(-1, -2)
    return torch.where(causal(q.shape[2]), scores, LOWEST).softmax(-1) @ repeat(v)


def masked_before_the_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeat(k).mT + torch.where(causal(q.shape[2]), 0.0, LOWEST)
    return (scores / 4).softmax(-1) @ repeat(v)


def window_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.where(causal(q.shape[2], 3), q @ repeat(k).mT * SCALE, LOWEST)
    return F.dropout(scores.softmax(-1), 0.0, training=False) @ repeat(v)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ repeat(k).mT * SCALE / 2) * 2
    return (scores + torch.where(causal(q.shape[2]), 0.0, LOWEST)).softmax(-1) @ repeat(v)


def multiplied_by_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = causal(q.shape[2]).float()
    return (q @ repeat(k).mT * SCALE * seen + -1e4 * (1 - seen)).softmax(-1) @ repeat(v)


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeat(k).mT * SCALE + torch.where(causal(q.shape[2]), 0.0, LOWEST)
    logits = torch.cat([scores, SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return logits.softmax(-1)[..., :-1] @ repeat(v)


def keys_put_together_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in latent attention: halves of the keys are written into an empty tensor."""
    keys = repeat(k)
    joined = keys.new_empty(keys.shape)
    joined[..., : HEAD_DIM // 2] = keys[..., : HEAD_DIM // 2]
    joined[..., HEAD_DIM // 2 :] = keys[..., HEAD_DIM // 2 :]
    return F.scaled_dot_product_attention(q, joined, repeat(v), attn_mask=causal(q.shape[2]))


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = SLOPES[:, None, None] * torch.arange(1 - q.shape[2], 1)
    scores = q @ repeat(k).mT * SCALE + bias
    return scores.masked_fill(~causal(q.shape[2]), LOWEST).softmax(-1) @ repeat(v)


def batched_alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in Bloom: heads merged with the batch, the bias added by baddbmm."""
    batch, heads, length, dim = q.shape
    bias = (SLOPES[None, :, None, None] * torch.arange(length)).expand(batch, -1, -1, -1).reshape(-1, 1, length)
    q, k, v = (x.reshape(batch * heads, length, dim) for x in (q, repeat(k), repeat(v)))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=SCALE).view(batch, heads, length, length)
    weights = (scores + torch.where(causal(length), 0.0, LOWEST)).softmax(-1)
    return torch.bmm(weights.view(batch * heads, length, length), v).view(batch, heads, length, dim)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (x.reshape(-1, length, dim) for x in (q, repeat(k), repeat(v)))
    weights = (torch.bmm(q, k.mT) * SCALE).masked_fill(~causal(length), LOWEST).softmax(-1)
    return torch.bmm(weights, v).view(batch, heads, length, dim)


def grouped_by_reshape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(1, (KV_HEADS, -1))
    scores = grouped @ k.unsqueeze(2).mT * SCALE
    weights = torch.where(causal(q.shape[2]), scores, LOWEST).softmax(-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def grouped_by_repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    return torch.where(causal(q.shape[2]), q @ k.mT * SCALE, LOWEST).softmax(-1) @ v


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    seen = causal(q.shape[2]) & (index[:, None] // 3 == index[None, :] // 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)


def sdpa_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v))


def sdpa_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal(q.shape[2], 5)[None, None].expand(q.shape[0], 1, -1, -1)
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask)


def sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -math.inf).triu(1)
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask)


def window_on_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=(index - index[:, None]).abs() < 4)


PLAIN = {"causal": True, "span": "full", "softcap": None, "scale": SCALE}


@pytest.mark.parametrize(
    ("form", "asked", "num_kv_heads", "has_bias"),
    [
        (eager, {}, KV_HEADS, False),
        (scale_on_both, {}, KV_HEADS, False),
        (scale_divides_the_query, {"scale": 0.25}, KV_HEADS, False),
        (masked_before_the_scale, {"scale": 0.25}, KV_HEADS, False),
        (window_by_where, {"span": "window_3"}, KV_HEADS, False),
        (softcapped, {"softcap": 2.0}, KV_HEADS, False),
        (multiplied_by_the_mask, {}, KV_HEADS, False),
        (with_sinks, {}, KV_HEADS, False),
        (keys_put_together_in_place, {}, HEADS, False),
        (alibi, {}, KV_HEADS, False),
        (batched_alibi, {}, KV_HEADS, False),
        (batched, {}, KV_HEADS, False),
        (grouped_by_reshape, {}, KV_HEADS, False),
        (grouped_by_repeat_interleave, {}, KV_HEADS, False),
        (chunked, {"span": "chunk_3"}, KV_HEADS, False),
        (sdpa_causal, {"scale": 0.3}, KV_HEADS, False),
        (sdpa_full, {"causal": False}, KV_HEADS, False),
        (sdpa_window, {"span": "window_5"}, KV_HEADS, False),
        (sdpa_float_mask, {}, KV_HEADS, False),
        (window_on_both_sides, {"causal": False, "span": "window_4"}, KV_HEADS, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_form(form: Form, asked: dict[str, Any], num_kv_heads: int, has_bias: bool) -> None:
    gm = export(form, tensors(3, 7))
    inputs = tensors(2, 13)
    before = gm(*inputs)
    node = reduced(gm)
    torch.testing.assert_close(gm(*inputs), before, atol=TOLERANCE, rtol=0)
    expected = PLAIN | asked
    assert {name: node.kwargs[name] for name in PLAIN} == expected | {"scale": pytest.approx(expected["scale"])}
    assert VALUE.of(node.args[1]).shape[1] == num_kv_heads  # type: ignore[union-attr]
    assert (node.args[4] is not None) == has_bias
    assert (node.args[3] is not None) == (form is with_sinks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """float64: the canonical softmax is float32. bfloat16: the scale is applied at another place, 8 bits."""
    gm = export(eager, tensors(3, 7, dtype))
    inputs = tensors(2, 13, dtype)
    before = gm(*inputs)
    reduced(gm)
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(gm(*inputs), before, atol=tolerance, rtol=0)


def test_queries_and_keys_in_float32_beside_values_in_bfloat16() -> None:
    def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.float() @ repeat(k).float().mT
        return torch.where(causal(q.shape[2]), scores, LOWEST).softmax(-1).to(v.dtype) @ repeat(v)

    gm = export(upcast, tensors(3, 7, torch.bfloat16))
    inputs = tensors(2, 13, torch.bfloat16)
    before = gm(*inputs)
    reduced(gm)
    assert gm(*inputs).dtype == torch.bfloat16
    torch.testing.assert_close(gm(*inputs), before, atol=2e-2, rtol=0)


def test_positions_are_asked_as_counting_up() -> None:
    def by_positions(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
        seen = position_ids[:, None, :, None] >= position_ids[:, None, None, :]
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=seen)

    positions = torch.arange(7).expand(3, 7).contiguous()
    node = reduced(export(by_positions, (*tensors(3, 7), positions)))
    assert (node.kwargs["causal"], node.kwargs["span"]) == (True, "full")


def test_a_padding_mask_of_eager_attention_is_kept_as_bias() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        seen = causal(q.shape[2]) & attention_mask[:, None, None, :]
        scores = q @ repeat(k).mT * SCALE + torch.where(seen, 0.0, LOWEST)
        return scores.softmax(-1) @ repeat(v)

    mask = torch.ones(3, 7, dtype=torch.bool)
    gm = export(padded, (*tensors(3, 7), mask))
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :4] = False  # whose first queries see nothing at all
    inputs = (*tensors(2, 13), mask)
    before = gm(*inputs)
    node = reduced(gm)
    assert node.kwargs["causal"] is False
    torch.testing.assert_close(gm(*inputs), before, atol=TOLERANCE, rtol=0)


def test_a_bias_that_is_an_input_is_kept() -> None:
    def relative(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ repeat(k).mT * SCALE + bias
        return torch.where(causal(q.shape[2]), scores, LOWEST).softmax(-1) @ repeat(v)

    gm = export(relative, (*tensors(3, 7), torch.randn(1, HEADS, 7, 7)))
    inputs = (*tensors(2, 13), torch.randn(1, HEADS, 13, 13))
    before = gm(*inputs)
    bias_of_hidden_rows = torch.full((1, HEADS, 13, 13), -math.inf).triu(1) + LOWEST
    hidden = gm(*inputs[:3], bias_of_hidden_rows)
    node = reduced(gm)
    # An input may hide all that a query sees: then the mask cannot be told apart from it.
    assert (node.kwargs["causal"], node.args[4] is not None) == (False, True)
    torch.testing.assert_close(gm(*inputs[:3], bias_of_hidden_rows), hidden, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(gm(*inputs), before, atol=TOLERANCE, rtol=0)


def test_a_mask_and_a_bias_in_one_are_told_apart() -> None:
    def relative(q: Tensor, k: Tensor, v: Tensor, types: Tensor) -> Tensor:
        bias = 0.1 * types[:, None, None, :].float()
        mask = bias + torch.where(causal(q.shape[2]), 0.0, LOWEST)
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask)

    gm = export(relative, (*tensors(3, 7), torch.ones(3, 7, dtype=torch.int64)))
    inputs = (*tensors(2, 13), torch.randint(9, (2, 13)))
    before = gm(*inputs)
    node = reduced(gm)
    assert (node.kwargs["causal"], node.args[4] is not None) == (True, True)
    torch.testing.assert_close(gm(*inputs), before, atol=TOLERANCE, rtol=0)
