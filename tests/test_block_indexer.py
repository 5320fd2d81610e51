"""A tiny Qwen4: sparse attention by blocks, n-grams of ids and a dilated convolution, beside the delta rule."""

from __future__ import annotations

from functools import cache

import torch
from greedy import check_greedy
from poison import by_token, poison_each_step
from torch import fx
from transformers import PreTrainedModel

import autodeploy as ad
from autodeploy.app.tiny import VOCAB_SIZE, tiny_model
from autodeploy.ops.kinds import kind_of

END = 2
# Blocks of 2 tokens, 4 of which are chosen; n-grams of up to 3 ids in the first layer.
QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "eos_token_id": END}
QWEN4 |= {"indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 64, "heads_per_ngram": 2}
QWEN4 |= {"ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4}
PROMPTS = [torch.arange(3, 3 + n).mul(37).remainder(VOCAB_SIZE - 3).add(3).tolist() for n in (1, 5, 19, 40, 30)]
PROMPTS[3][10:13] = [END, 7, END]


@cache
def tiny() -> PreTrainedModel:
    return tiny_model("qwen4_exp_text", overrides=QWEN4)


@cache
def traced() -> fx.GraphModule:
    return ad.trace(tiny())


def test_logits_equal_eager() -> None:
    assert "block_indexer" in {kind.name for node in traced().graph.nodes if (kind := kind_of(node.target))}
    inputs = {"input_ids": torch.tensor([PROMPTS[3]]), "position_ids": torch.arange(40)[None]}
    with torch.no_grad():
        want, got = tiny()(**inputs).logits, traced()(**inputs)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_ragged_preempted_and_poisoned() -> None:
    """Prompts in chunks, too few pages for all requests, and NaN in all that nobody owns."""
    sizes = {"page_size": 4, "max_num_seqs": 4, "max_num_tokens": 16}
    llm = ad.LLM(tiny(), compile=False, num_pages=14, **sizes)
    poison_each_step(llm._engine, ad.apply(traced(), page_size=4).cache_specs, by_token)
    outputs = llm.generate(PROMPTS, ad.SamplingParams(max_tokens=10, ignore_eos=True))
    assert llm.stats.num_preemptions > 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check_greedy(tiny(), prompt, output.token_ids)
