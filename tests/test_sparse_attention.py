"""Sparse attention: an indexer chooses, a latent attention sees what was chosen; or it is said why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import export
from torch import Tensor, fx
from torch.nn import functional as F
from traces import count

import autodeploy as ad
from autodeploy.app.coverage import coverage
from autodeploy.app.tiny import VOCAB_SIZE, tiny_model
from autodeploy.errors import NoAttentionFound
from autodeploy.ops.kinds.lightning_indexer import lightning_indexer

INDEXER = torch.ops.autodeploy.lightning_indexer.default
PROMPT_LENGTHS = (5, 17, 1, 40)  # below and above the eight tokens that are chosen


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4"])
def test_tokens_are_those_of_transformers(model_type: str) -> None:
    # With few heads, tokens tie at a score of zero, and which one of them is chosen depends on how rows are cut.
    model = tiny_model(model_type, overrides={"index_n_heads": 32, "use_cache": True}, num_layers=2)
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB_SIZE, (1, length), generator=generator) for length in PROMPT_LENGTHS]
    llm = ad.LLM(model, compile=False, max_num_seqs=4, max_num_tokens=16)
    sampling = ad.SamplingParams(max_tokens=12, ignore_eos=True)
    answers = llm.generate([prompt[0].tolist() for prompt in prompts], sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
        assert list(answer.token_ids) == expected[0, prompt.shape[1] :].tolist()


def test_layers_are_two_nodes_each() -> None:
    layers = coverage("deepseek_v32").layers
    assert [layer.kind for layer in layers] == ["lightning_indexer", "latent_attention"] * 4
    assert {layer.refusal for layer in layers} == {None}


def test_sparse_attention_without_a_latent_has_the_oracle_alone() -> None:
    """Sixteen elements of each key and value are no more than the latent's 40."""
    model = tiny_model("deepseek_v32", overrides={"kv_lora_rank": 512})
    layers = coverage(model).layers
    assert [layer.backend for layer in layers if layer.kind == "attention"] == ["reference"] * 4
    found = coverage(model, backend="sdpa")
    assert found.refusal is not None
    assert "no sparse attention" in found.refusal.what


def scores(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    each = F.relu(torch.matmul(query, key.transpose(-1, -2).unsqueeze(1)) * 0.5)
    return torch.matmul(weights.unsqueeze(-2), each).squeeze(-2)


def hidden(length: int, window: int | None = None) -> Tensor:
    index = torch.arange(length)
    later = index[None, :] > index[:, None]
    return later if window is None else later | (index[None, :] <= index[:, None] - window)


def masked(total: Tensor) -> Tensor:
    return total.masked_fill(hidden(total.shape[-1]), -torch.inf)


def added(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    total = scores(query, key, weights)
    mask = torch.zeros(total.shape[-1], total.shape[-1]).masked_fill(hidden(total.shape[-1]), -3e38)
    return (total + mask).topk(3, dim=-1)[1]


def filled(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    return masked(scores(query, key, weights)).topk(3)[1]


def smallest(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    return masked(scores(query, key, weights)).topk(3, largest=False)[1]


def with_values(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    best = masked(scores(query, key, weights)).topk(3)
    return best.indices + best.values


def with_a_window(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    total = scores(query, key, weights)
    return total.masked_fill(hidden(total.shape[-1], 4), -torch.inf).topk(3)[1]


def without_a_mask(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    return scores(query, key, weights).topk(3)[1]


def squared(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    each = torch.matmul(query, key.transpose(-1, -2).unsqueeze(1)).square()
    return masked(torch.matmul(weights.unsqueeze(-2), each).squeeze(-2)).topk(3)[1]


def of_keys_turned_around(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    return masked(scores(query, key.flip(-1), weights).transpose(-1, -2)).topk(3)[1]


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(batch * length)
    return torch.randn(batch, length, 8, 4), torch.randn(batch, length, 4), torch.randn(batch, length, 8)


@pytest.mark.parametrize("form", [added, filled])
def test_indexers_that_are_found(form: Callable[..., Tensor]) -> None:
    gm = found(form)
    assert count(gm, INDEXER) == 1
    query, key, weights = inputs(2, 11)
    got, expected = gm(query, key, weights), form(query, key, weights)
    for place in range(3, 11):  # earlier tokens have fewer than three to choose from
        assert torch.equal(got[:, place].sort().values, expected[:, place].sort().values)
    assert (got[:, 0] == torch.tensor([0, -1, -1])).all()


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (smallest, "other than the best"),
        (with_values, "uses their scores"),
        (with_a_window, "not among all up to each one"),
        (without_a_mask, "not among all up to each one"),
        (squared, "other than positive scores"),
        (of_keys_turned_around, "by something other than a product"),
    ],
)
def test_indexers_that_are_not(form: Callable[..., Tensor], reason: str) -> None:
    with pytest.raises(NoAttentionFound, match=reason):
        found(form)


def found(form: Callable[..., Tensor]) -> fx.GraphModule:
    result = ad.apply(export(form, inputs(3, 7)), passes=["find_attention"])
    return result.module


def test_packed_sequences_choose_by_themselves() -> None:
    query, key, weights = inputs(1, 12)
    cu_seqlens = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    packed = lightning_indexer(query, key, weights, cu_seqlens, num_chosen=5)
    for start, stop in ((0, 4), (4, 11)):
        alone = lightning_indexer(query[:, start:stop], key[:, start:stop], weights[:, start:stop], num_chosen=5)
        assert torch.equal(packed[:, start:stop], alone)
    assert (packed[:, 11:] == -1).all()
