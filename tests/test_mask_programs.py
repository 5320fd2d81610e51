"""Masks are named by what they show up to the largest position: random programs, and those that were named wrongly."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from attention_graphs import ATTENTION, Form, export, reduced, tensors
from mask_programs import BLOCK, FORMS, LENGTHS, NUM_POSITIONS, Generator, ask_function, ask_graph, flex
from test_attention_forms import causal, repeat
from torch import Tensor
from torch.nn import functional as F
from transformers import masking_utils

from autodeploy.errors import NoAttentionFound
from autodeploy.graph import meta
from autodeploy.graph.edit import get_attribute
from autodeploy.graph.meta import LOOKED_AT
from autodeploy.metadata.span import Window
from autodeploy.trace.mask import Mask, read_mask
from passes import FindAttention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
WINDOW, CHUNKS = torch.tensor(40), torch.arange(4096) // 50


def test_functions_are_never_named_wrongly() -> None:
    generator = Generator(0, NUM_POSITIONS)
    counts = Counter(ask_function(generator.program()) for _ in range(100))
    assert counts["wrong"] == 0
    assert counts["named"] > 20


@pytest.mark.parametrize("form", FORMS)
def test_graphs_are_never_named_wrongly(form: Form) -> None:
    generator = Generator(0, BLOCK if form is flex else 1000)
    counts = Counter(ask_graph(generator.program(), form, LENGTHS[:3]) for _ in range(5))
    assert counts["wrong"] == 0


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=seen)


def window_in_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    return attention(q, k, v, causal(q.shape[2]) & (index[:, None] - index < WINDOW))


def chunks_in_a_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    chunk = CHUNKS[torch.arange(q.shape[2])]
    return attention(q, k, v, causal(q.shape[2]) & (chunk[:, None] == chunk))


def chunks_of_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    chunk = torch.arange(q.shape[2]) // 16 // 16
    return attention(q, k, v, causal(q.shape[2]) & (chunk[:, None] == chunk))


def seen_backwards_from_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal up to 200 tokens: the last of them decides."""
    index = torch.arange(q.shape[2])
    return attention(q, k, v, (index <= index[:, None]) & (index >= index.max() - 200) | (index == index[:, None]))


def far_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal(q.shape[2], 100_000))


@pytest.mark.parametrize(
    ("form", "span"),
    [
        (window_in_a_tensor, "window_40"),
        (chunks_in_a_table, "chunk_50"),
        (chunks_of_chunks, "chunk_256"),
        (seen_backwards_from_the_end, "refused"),
        (far_window, "window_100000"),
    ],
)
def test_what_shows_far_away(form: Form, span: str) -> None:
    gm = export(form, tensors(3, 7))
    inputs = tensors(2, 300)
    before = gm(*inputs)
    if span == "refused":
        with pytest.raises(NoAttentionFound, match=r"max.default is not known to treat positions one by one"):
            FindAttention().apply(gm)
        return
    node = reduced(gm)
    torch.testing.assert_close(gm(*inputs), before, atol=1e-5, rtol=0)  # float32, values of size one
    assert node.kwargs["span"] == span.replace("bias", "full")
    assert (node.args[4] is not None) == (span == "bias")


def test_a_value_that_was_looked_at_is_noted() -> None:
    gm = export(window_in_a_tensor, tensors(3, 7))
    FindAttention().apply(gm)
    (name,) = LOOKED_AT.of(gm)
    assert get_attribute(gm, name) == WINDOW


@pytest.mark.parametrize("num_positions", [1000, 1 << 20])
def test_a_mask_is_asked_up_to_the_models_largest_position(num_positions: int) -> None:
    """A single pair beyond position 1000 is hidden."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = torch.arange(q.shape[2])
        return attention(q, k, v, causal(q.shape[2]) & ((index[:, None] != 654_321) | (index != 7)))

    gm = export(form, tensors(3, 7))
    meta.NUM_POSITIONS.set(gm, num_positions)
    FindAttention().apply(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    assert node.kwargs["causal"] == (num_positions == 1000)


def test_masks_of_transformers() -> None:
    """Up to 2^20 positions; a function of the batch or of its own length is refused."""
    window = masking_utils.sliding_window_causal_mask_function(4096)
    assert read_mask(window, 1 << 20) == Mask(span=Window(4096))
    assert read_mask(masking_utils.bidirectional_mask_function, 1 << 20) == Mask(causal=False)
    for function in (lambda b, h, q, k: (k <= q) & (h < 3), lambda b, h, q, k: torch.arange(9)[k] <= q):
        assert read_mask(function, 1000).refused
