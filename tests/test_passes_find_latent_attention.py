"""`find_latent_attention`: one vector per token is found however it is spelled, and what is none is left alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_graphs import export
from torch import Tensor, fx, nn
from torch.nn import functional as F
from traces import apply, before, count

from autodeploy.app.coverage import coverage
from autodeploy.app.tiny import tiny_model
from autodeploy.graph.edit import take_near_misses
from passes import FindAttention, FindLatentAttention

HEADS, OWN, SHARED, VALUE, RANK = 4, 6, 3, 5, 8
LATENT = torch.ops.autodeploy.latent_attention.default
CHOICES = {
    "order": ("own first", "shared first"),
    "weights": ("one", "values first", "two"),
    "joined": ("cat", "copies", "cat of tokens first"),
    "latent": ("three dimensions", "four dimensions"),
    "shared": ("expand", "repeat", "of the latent's layer"),
    "mixed": ("sdpa", "eager"),
}
SPELLINGS = [dict(zip(CHOICES, each, strict=True)) for each in itertools.product(*CHOICES.values())]


class Mla(nn.Module):
    """A layer from its latents on, spelled as `how` says; `change` makes keys and values those of no latent."""

    def __init__(self, how: dict[str, str], change: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None):
        super().__init__()
        self.how, self.change = how, change
        self.down = nn.Linear(10, RANK + SHARED)
        sizes = [OWN, VALUE] if how["weights"] == "two" else [OWN + VALUE]
        self.up = nn.ModuleList(nn.Linear(RANK, HEADS * size, bias=False) for size in sizes)

    def forward(self, query: Tensor, hidden: Tensor) -> Tensor:
        latent, shared = self.down(hidden).split([RANK, SHARED], dim=-1)
        if self.how["shared"] != "of the latent's layer":
            shared = shared * 2
        products = self._products(torch.tanh(latent))
        own, value = (each.transpose(1, 2) for each in products)
        key = self._key(own, shared)
        if self.change:
            query, key, value = self.change(query, key, value)
        if self.how["mixed"] == "sdpa":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_places = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool).tril().logical_not()
        return (query @ key.mT / 3).masked_fill(hidden_places, -torch.inf).softmax(-1) @ value

    def _products(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, H, .] of keys and values."""
        batch, tokens = latent.shape[:2]
        if self.how["latent"] == "four dimensions":
            latent = latent.view(batch, 1, tokens, RANK)
        if len(self.up) == 2:
            key, value = (up(latent).reshape(batch, tokens, HEADS, -1) for up in self.up)
            return key, value
        both = self.up[0](latent).view(batch, tokens, HEADS, OWN + VALUE)
        if self.how["weights"] == "values first":
            return both[..., VALUE:], both[..., :VALUE]
        own, value = both.split([OWN, VALUE], dim=-1)
        return own, value

    def _key(self, own: Tensor, shared: Tensor) -> Tensor:
        shared = shared[:, None]
        shared = shared.repeat(1, HEADS, 1, 1) if self.how["shared"] == "repeat" else shared.expand(-1, HEADS, -1, -1)
        parts = [own, shared] if self.how["order"] == "own first" else [shared, own]
        if self.how["joined"] == "cat":
            return torch.cat(parts, dim=-1)
        if self.how["joined"] == "cat of tokens first":
            return torch.cat([part.transpose(1, 2) for part in parts], dim=-1).transpose(1, 2)
        key = own.new_empty(*own.shape[:3], OWN + SHARED)
        first = parts[0].shape[-1]
        key[..., :first] = parts[0]
        key[..., first:].copy_(parts[1])
        return key


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch * length)
    return torch.randn(batch, HEADS, length, OWN + SHARED), torch.randn(batch, length, 10)


def found(layer: nn.Module) -> fx.GraphModule:
    gm = export(layer, inputs(3, 7))
    FindAttention().apply(gm)
    gm.graph.eliminate_dead_code()
    take_near_misses(gm)
    FindLatentAttention().apply(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


@pytest.mark.parametrize("how", random.Random(0).sample(SPELLINGS, 24), ids=lambda how: ", ".join(how.values()))
def test_however_it_is_spelled(how: dict[str, str]) -> None:
    torch.manual_seed(1)
    layer = Mla(how)
    gm = found(layer)
    assert count(gm, LATENT) == 1
    assert not [
        node for node in gm.graph.nodes if getattr(node.target, "_schema", None) and node.target._schema.is_mutable
    ]
    for batch, length in ((2, 5), (4, 11)):
        query, hidden = inputs(batch, length)
        with torch.no_grad():
            torch.testing.assert_close(gm(query, hidden), layer(query, hidden), atol=1e-5, rtol=1e-5)


def gate(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return query, key * torch.sigmoid(key), value


def norm(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return query, F.normalize(key, dim=-1), value


def another_token(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return query, key, torch.cat([value[:, :, :1], value[:, :, :-1]], dim=2)


def heads_in_another_order(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return query, key, torch.cat([value[:, 1:], value[:, :1]], dim=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(gate, None), (norm, None), (another_token, None), (heads_in_another_order, "order of their own")],
)
def test_what_is_no_product_of_one_vector_is_left_alone(change: Callable[..., Any], reason: str | None) -> None:
    gm = found(Mla(SPELLINGS[0], change))
    assert count(gm, LATENT) == 0
    misses = [why for _, why in take_near_misses(gm)]
    assert [reason in why for why in misses] == [True] if reason else misses == []


class Wide(Mla):
    """A latent larger than the keys and values of all heads."""

    def __init__(self) -> None:
        super().__init__(SPELLINGS[0])
        self.widen = nn.Linear(RANK, 64)
        self.up = nn.ModuleList([nn.Linear(64, HEADS * (OWN + VALUE), bias=False)])

    def _products(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        both = self.up[0](self.widen(latent)).unflatten(-1, (HEADS, OWN + VALUE))
        return both[..., :OWN], both[..., OWN:]


class Biased(Mla):
    """Products that add something of their own."""

    def __init__(self) -> None:
        super().__init__(SPELLINGS[0])
        self.up = nn.ModuleList([nn.Linear(RANK, HEADS * (OWN + VALUE))])


def test_a_latent_that_saves_nothing() -> None:
    gm = found(Wide())
    ((_, reason),) = take_near_misses(gm)
    assert reason == "has a latent of 67 elements, no fewer than the 56 of its keys and values"


def test_products_with_a_bias() -> None:
    assert count(found(Biased()), LATENT) == 0


@pytest.mark.parametrize("model_type", ["deepseek_v2", "minicpm3", "glm4_moe_lite"])
def test_on_models(model_type: str) -> None:
    """Models of other authors; the answers of deepseek_v3 are compared with transformers' as those of all types are."""
    layers = coverage(model_type).layers
    assert [(layer.kind, layer.num_bytes("token")) for layer in layers] == [("latent_attention", (32 + 8) * 4)] * 4


def test_what_every_pass_owes() -> None:
    gm = before("find_latent_attention", "deepseek_v3")
    assert apply(FindLatentAttention(), gm) == 4
    assert count(gm, torch.ops.autodeploy.attention.default) == 0


def test_memory_is_that_of_the_paper() -> None:
    """DeepSeek-V3 caches 512 + 64 elements of a token in each of 61 layers (arXiv 2412.19437): 70 KB in bfloat16."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    model = tiny_model("deepseek_v3", overrides=sizes, num_layers=2)
    layers = coverage(model.to(torch.bfloat16)).layers
    assert [layer.num_bytes("token") * 61 for layer in layers] == [70_272] * 2
