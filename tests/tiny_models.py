"""Tiny causal language models with random weights: the model types that the tests run on, built without a download.

Hidden size 64, 4 heads, 2 key-value heads of size 16, 128 tokens, sliding window 8, 512 positions, eager attention.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FULL, SLIDING, CHUNKED, CONV = "full_attention", "sliding_attention", "chunked_attention", "conv"
WINDOW = 8
VOCAB_SIZE = 128
HEAD_DIM = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED: dict[str, Any] = {"intermediate_size": 96, "num_key_value_heads": 2}
_HEADS: dict[str, Any] = {"head_dim": HEAD_DIM}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_CHUNKED: dict[str, Any] = {"intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1}
_CHUNKED |= {"attention_chunk_size": WINDOW, "floor_scale": 4, "interleave_moe_layer_step": 2}
_PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE, "global_head_dim": HEAD_DIM}
_LATENT: dict[str, Any] = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
_LATENT |= {"v_head_dim": HEAD_DIM, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
_LATENT |= {"intermediate_size": 96, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_key_value_heads": 4}
_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 16}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "qwen3": _GATED | _HEADS,
    "mistral": _GATED | _HEADS | {"sliding_window": WINDOW},
    # A softcap this low bends the small scores of random weights visibly.
    "gemma2": _GATED | _HEADS | {"sliding_window": WINDOW, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 1.0},
    "gemma3_text": _GATED | _HEADS | {"sliding_window": WINDOW, "query_pre_attn_scalar": 64},
    "gpt_oss": _GATED | _HEADS | _EXPERTS | {"sliding_window": WINDOW, "rope_parameters": _YARN},
    "phi3": _GATED,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": {},
    "mixtral": _GATED | _EXPERTS,
    "lfm2": _GATED | {"block_auto_adjust_ff_dim": False},
    "deepseek_v3": _LATENT,
    "llama4_text": _GATED | _HEADS | _CHUNKED,
    # The last two layers read the keys and values of the first two.
    "gemma4_text": _GATED | _HEADS | {"sliding_window": WINDOW, "num_kv_shared_layers": 2, **_PER_LAYER},
}
_LAYER_CYCLES = {
    "gemma2": (SLIDING, FULL),
    "gemma3_text": (SLIDING, SLIDING, SLIDING, FULL),
    "gpt_oss": (SLIDING, FULL),
    "lfm2": (CONV, FULL),
    "llama4_text": (CHUNKED, CHUNKED, CHUNKED, FULL),
    "gemma4_text": (SLIDING, FULL),
}
MODEL_TYPES = tuple(_CONFIGS)


@cache
def tiny(model_type: str, num_layers: int = 4) -> PreTrainedModel:
    """The model of that type in fp32 and evaluation mode; the same object each time, so leave it as it is."""
    sizes = _COMMON | {"num_hidden_layers": num_layers} | _CONFIGS[model_type]
    if cycle := _LAYER_CYCLES.get(model_type):
        sizes["layer_types"] = [cycle[layer % len(cycle)] for layer in range(num_layers)]
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    _randomize(model)
    return model


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    """input_ids and position_ids [batch, length] int64 of unpadded sequences."""
    generator = torch.Generator().manual_seed(1000 * batch + length)
    return {
        "input_ids": torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator),
        "position_ids": torch.arange(length).expand(batch, length).contiguous(),
    }


def _randomize(model: PreTrainedModel) -> None:
    """Fan-in scaled weights: with transformers' own, small ones, masks, sinks and gates would not move the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                start = torch.zeros_like(weight) if name.endswith("sinks") else weight
                weight.copy_(start + 0.1 * noise)
            else:
                fan_in = weight[0].numel() if "conv" in name else weight.shape[-1]
                weight.copy_(noise * fan_in**-0.5)
