"""Models that count tokens on the host for experts of their own: traced without, equal to transformers."""

from __future__ import annotations

import pytest
import torch
from greedy import check_greedy
from tiny_models import VOCAB_SIZE
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from transformers import AutoModelForCausalLM, DbrxConfig, JetMoeConfig, PreTrainedConfig

import autodeploy as ad
from autodeploy.graph.meta import VALUE

PROMPTS = [torch.arange(3, 3 + n).mul(37).remainder(VOCAB_SIZE - 3).add(3).tolist() for n in (1, 5, 19)]


CONFIGS = (
    DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=VOCAB_SIZE,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    JetMoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    ),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_no_size_depends_on_data(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape)
    gm = ad.trace(model)
    assert not any(free_unbacked_symbols(VALUE.get(node)) for node in gm.graph.nodes)
    ids = torch.tensor(PROMPTS[2]).view(1, -1).repeat(3, 1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        given = {"input_ids": ids, "position_ids": torch.arange(19).expand(3, 19)}
        got = gm(*(given[str(node.target)] for node in gm.graph.find_nodes(op="placeholder")))
    torch.testing.assert_close(got, logits, atol=1e-4 * logits.abs().max().item(), rtol=0)
    outputs = ad.LLM(model, compile=False).generate(PROMPTS, ad.SamplingParams(max_tokens=10, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check_greedy(model, prompt, output.token_ids)
