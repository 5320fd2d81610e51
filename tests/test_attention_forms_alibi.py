"""Which biases find_attention reads as ALiBi, and which only look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import HEAD_DIM, HEADS, KV_HEADS, export, reduced, tensors
from torch import Tensor, fx
from transformers import AutoConfig, AutoModelForCausalLM

import autodeploy as ad
from autodeploy.graph.edit import get_attribute
from autodeploy.graph.meta import VALUE
from autodeploy.trace.aten import from_export

TOLERANCE = 1e-5  # float32, values of size one
SLOPES = torch.tensor([0.5, 0.3, 0.125, -0.1])
Bias = Callable[[Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Bias, sinks: Tensor | None = None, window: int = 99) -> Tensor:
    index = torch.arange(q.shape[2])
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = q @ k.mT * HEAD_DIM**-0.5 + bias(index)
    seen = (index <= index[:, None]) & (index > index[:, None] - window)
    scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


def by_distance(index: Tensor) -> Tensor:
    return SLOPES[:, None, None] * (index - index[:, None])


def by_key_position(index: Tensor) -> Tensor:
    return SLOPES[:, None, None] * index


def from_the_last_position(index: Tensor) -> Tensor:
    return (SLOPES.view(1, -1, 1, 1) * (index - index.shape[0] + 1)).to(torch.float32)


def by_size_of_distance(index: Tensor) -> Tensor:
    """Where the mask shows it, this is ALiBi too."""
    return -SLOPES[:, None, None] * (index - index[:, None]).abs()


def in_bfloat16(index: Tensor) -> Tensor:
    return by_distance(index).bfloat16().float()


def squared(index: Tensor) -> Tensor:
    return by_distance(index) * (index - index[:, None])


def by_query_position(index: Tensor) -> Tensor:
    return by_key_position(index) * (1 + index[:, None])


def clipped(index: Tensor) -> Tensor:
    return SLOPES[:, None, None] * (index - index[:, None]).clamp(min=-20)


def found(bias: Bias, sinks: Tensor | None = None, window: int = 99) -> tuple[fx.Node, fx.GraphModule]:
    """The canonical node, which gives the same numbers at another size as the graph did, and its graph."""
    gm = export(lambda q, k, v: attention(q, k, v, bias, sinks, window), tensors(3, 7))
    inputs = tensors(2, 40)
    before = gm(*inputs)
    node = reduced(gm)
    torch.testing.assert_close(gm(*inputs), before, atol=TOLERANCE, rtol=0)
    return node, gm


@pytest.mark.parametrize("window", [99, 4])
@pytest.mark.parametrize("bias", [by_distance, by_key_position, from_the_last_position, by_size_of_distance])
def test_becomes_slopes(bias: Bias, window: int) -> None:
    node, gm = found(bias, window=window)
    slopes = node.kwargs["alibi_slopes"]
    assert isinstance(slopes, fx.Node)
    assert VALUE.of(slopes).shape == (HEADS,)
    torch.testing.assert_close(get_attribute(gm, str(slopes.target)), SLOPES)
    assert node.args[4] is None


@pytest.mark.parametrize("bias", [in_bfloat16, squared, by_query_position, clipped])
def test_stays_a_bias(bias: Bias) -> None:
    node, _ = found(bias)
    assert node.kwargs["alibi_slopes"] is None
    assert node.args[4] is not None


@pytest.mark.parametrize("bias", [by_distance, by_key_position])
def test_sinks_see_where_distances_are_counted_from(bias: Bias) -> None:
    node, _ = found(bias, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    assert (node.kwargs["alibi_slopes"] is not None) == (bias is by_distance)


@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_a_model_exported_as_it_is_gets_paged(model_type: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    # With transformers' own, small weights, slopes would not move the logits.
    config = AutoConfig.for_model(model_type, **sizes, initializer_range=0.2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    shapes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    inputs = {"input_ids": torch.randint(64, (2, 12)), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False, dynamic_shapes=shapes)
    result = ad.apply(from_export(program), verify=True)
    assert len(result.cache_specs) == 2 * 2
