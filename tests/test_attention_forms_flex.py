"""flex_attention: what its score_mod and mask_mod ask is found, its block lists are dropped."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import Form, export, reduced, tensors
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from autodeploy.errors import NoAttentionFound
from passes import FindAttention

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
BLOCK = 128  # the size of a block of a block mask; an export of one is held to a single block
FLEX = torch.ops.higher_order.flex_attention
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def block_mask(length: int, mod: Form = causal) -> BlockMask:
    return create_block_mask(mod, None, None, length, length, device="cpu")


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, block_mask=block_mask(q.shape[2]), enable_gqa=True)  # type: ignore[return-value]


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = block_mask(q.shape[2], lambda b, h, i, j: (i >= j) & (i - j < 4))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)  # type: ignore[return-value]


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def softcap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 3 * torch.tanh(score / 3)

    return flex_attention(q, k, v, softcap, block_mask(q.shape[2]), scale=0.5, enable_gqa=True)  # type: ignore[return-value]


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + SLOPES[h] * (j - i)

    return flex_attention(q, k, v, bias, block_mask(q.shape[2]), enable_gqa=True)  # type: ignore[return-value]


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, enable_gqa=True)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("form", "asked"),
    [
        (masked, {"causal": True, "span": "full"}),
        (windowed, {"causal": True, "span": "window_4"}),
        (softcapped, {"causal": True, "softcap": 3.0, "scale": 0.5}),
        (alibi, {"causal": True}),
        (unmasked, {"causal": False, "span": "full"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_form(form: Form, asked: dict[str, object]) -> None:
    gm = export(form, tensors(3, 7), max_length=None if form is unmasked else BLOCK)
    inputs = tensors(2, 13)
    node = reduced(gm)
    # The exported graph of a flex_attention does not run by itself (torch 2.13).
    torch.testing.assert_close(gm(*inputs), form(*inputs), atol=1e-5, rtol=0)
    assert {name: node.kwargs[name] for name in asked} == pytest.approx(asked)
    assert node.args[4] is None
    assert (node.kwargs["alibi_slopes"] is not None) == (form is alibi)
    assert not gm.graph.find_nodes(op="call_function", target=FLEX)
    assert len(gm.graph.nodes) < 25  # nothing is left of the block lists


def test_refused() -> None:
    def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, lambda score, b, h, i, j: score * score, enable_gqa=True)  # type: ignore[return-value]

    gm = export(squared, tensors(3, 7))
    graph = str(gm.graph)
    with pytest.raises(NoAttentionFound, match="is not a constant"):
        FindAttention().apply(gm)
    assert str(gm.graph) == graph
