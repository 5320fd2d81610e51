"""Tiny random-weight causal language models of transformers' types, built from their config classes without a download.

A config class is instantiated with its defaults; sizes are shrunk by the names of its fields, and per-layer lists to
layers that still show every kind. Hidden size 64, 4 heads of size 16, 2 key-value heads where they are grouped,
sliding windows of 8 tokens, 128 tokens, 512 positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 128
WINDOW = 8
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM, _EXPERTS, _RANK, _POSITIONS = 64, 96, 4, 2, 16, 4, 32, 512

_NAMES = """
    apertus aria_text axk2 bamba bart beam bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small
    bloom camembert codegen cohere cohere2 cpmant data2vec-text deepseek_v3 deepseek_v32 deepseek_v4 electra emu3
    ernie ernie4_5_moe exaone_moe falcon falcon_mamba flint fuyu gemma gemma2 gemma3 gemma3_text gemma4_text
    gemma4_unified_text git glm glm4 glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_neo gpt_neox_japanese
    gpt_oss gptj granite granitemoe granitemoe_swa granitemoehybrid granitemoeshared hrm_text hunyuan_v1_dense hy_v3
    hy_v4 hyperclovax inkling2_text inkling_text iquestcoder jetmoe kimi_linear lfm2 lfm3 llama llama4 llama4_text
    mamba marian mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m3_vl_text ministral mistral
    mixtral mllama moshi moss_transcribe_diarize mpt mvp nanochat olmo olmo2 openai-gpt opt pegasus persimmon phi3
    phi4_multimodal plbart prophetnet qwen2 qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next rembert
    roberta roberta-prelayernorm roc_bert roformer rwkv trocr whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet
    xlstm xmod
"""
TYPES = tuple(_NAMES.split())  # those whose tiny model runs

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_SIZES: tuple[tuple[int, str], ...] = (
    (
        _HIDDEN,
        "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim dim attention_hidden_size lru_width",
    ),
    (
        _INNER,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size n_inner dff "
        "ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
        "dense_intermediate_size intermediate_size_mlp dim_ff shared_experts_intermediate_size",
    ),
    (
        _HEADS,
        "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads "
        "swa_num_attention_heads linear_num_value_heads index_n_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts",
    ),
    (
        _KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k top_k moe_top_k n_group num_expert_group",
    ),
    (
        _HEAD_DIM,
        "head_dim d_head d_kv dim_head global_head_dim swa_head_dim qk_nope_head_dim v_head_dim kv_channels "
        "attention_head_size linear_key_head_dim linear_value_head_dim index_head_dim swa_v_head_dim "
        "attention_head_dim state_size ssm_state_size mamba_d_state mamba_d_head mamba_head_dim "
        "hidden_size_per_layer_input",
    ),
    (
        _HEAD_DIM // 2,
        "qk_rope_head_dim rotary_dim time_step_rank mamba_n_heads mamba_num_heads adapter_rank laurel_rank",
    ),
    (_HEAD_DIM + _HEAD_DIM // 2, "qk_head_dim"),
    (_RANK, "kv_lora_rank q_lora_rank o_lora_rank"),
    (1, "mamba_n_groups n_groups topk_group first_k_dense_replace num_dense_layers"),
    (2 * _HIDDEN, "mamba_d_ssm"),
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (_POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size local_attention chunk_size "
        "mamba_chunk_size attention_chunk_size",
    ),
)
_FIELDS: dict[str, Any] = {name: size for size, names in _SIZES for name in names.split()}
# A softcap this low bends the small scores of random weights visibly.
_FIELDS |= {"attn_logit_softcapping": 1.0, "is_decoder": True, "use_cache": False}
_FIELDS |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "cls_token_id": 4}
_OFF = ("router_jitter_noise", "input_jitter_noise", "layerdrop")

_FULL, _SLIDING = "full_attention", "sliding_attention"
# What cannot be told from names: defaults that are incomplete, and layer patterns that defaults do not show.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ("conv", _FULL)},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ("linear_attention", _FULL)},
    "gpt_neo": {"attention_types": lambda layers: [[["global", "local"], layers // 2]]},
    "hunyuan_v1_dense": {"head_dim": _HEAD_DIM},
    "ministral": {"head_dim": _HEAD_DIM},
    "gemma4_text": {"layer_types": (_SLIDING, _FULL), "num_kv_shared_layers": 2, "global_head_dim": 2 * _HEAD_DIM},
    "xmod": {"default_language": "en_XX"},
}


def tiny(model_type: str, num_layers: int = 4, attn_implementation: str = "eager") -> PreTrainedModel:
    """The model of `model_type` in float32 and evaluation mode, the same weights each time.

    Raises KeyError for an unknown type and whatever transformers raises for one that it cannot build.
    """
    config = _shrink(CONFIG_MAPPING[model_type], num_layers)
    torch.manual_seed(0)  # for what transformers draws itself
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    _randomize(model)
    return model.eval()


def _shrink(config_class: type[PreTrainedConfig], num_layers: int) -> PreTrainedConfig:
    base = config_class()
    given = {field.name: _value(base, field.name) for field in dataclasses.fields(config_class)}
    shrunk = {name: small for name, value in given.items() if (small := _small(name, value)) != value}
    layers_name = next((name for name in _LAYER_COUNTS if isinstance(given.get(name), int)), None)
    if layers_name is not None:
        shrunk |= _layer_lists(given, given[layers_name], num_layers) | {layers_name: num_layers}
    if given.get("kv_lora_rank") and "num_key_value_heads" in given:
        shrunk["num_key_value_heads"] = _HEADS  # latent attention has a key head for each query head
    for name, sub_class in config_class.sub_configs.items():
        if isinstance(given.get(name), PreTrainedConfig):
            shrunk[name] = _shrink(type(given[name]) if sub_class is not type(given[name]) else sub_class, num_layers)
    for name, value in _OVERRIDES.get(config_class.model_type, {}).items():
        shrunk[name] = _override(value, num_layers)
    return config_class(**shrunk)


def _value(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # heterogeneous configs raise for what differs from layer to layer
        return vars(config).get(name)


def _small(name: str, value: Any) -> Any:
    """The size that a field of that name has in a tiny model, or `value` where its name says nothing."""
    if value is None or isinstance(value, list | tuple | dict):
        return value
    if name in _FIELDS and isinstance(value, type(_FIELDS[name])):
        return _FIELDS[name]
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB_SIZE:
        return VOCAB_SIZE - 1
    is_rate = isinstance(value, float | int) and not isinstance(value, bool)
    if is_rate and ("dropout" in name or name.endswith("pdrop") or name in _OFF):
        return type(value)(0)
    return value


def _layer_lists(given: dict[str, Any], num_given: int, num_layers: int) -> dict[str, Any]:
    """Fields with one entry per layer, cut to layers of every kind, or repeated."""
    lists = {k: v for k, v in given.items() if isinstance(v, list | tuple) and len(v) == num_given > 1}
    kinds = [repr([value[layer] for value in lists.values()]) for layer in range(num_given)]
    firsts = [layer for layer, kind in enumerate(kinds) if kind not in kinds[:layer]][:num_layers]
    others = [layer for layer in range(num_given) if layer not in firsts]
    layers = sorted(firsts + others[: num_layers - len(firsts)])
    layers += [layer % num_given for layer in range(len(layers), num_layers)]
    return {name: [_small(name, value[layer]) for layer in layers] for name, value in lists.items()}


def _override(value: Any, num_layers: int) -> Any:
    """A tuple is a pattern of layers, a function is one of their number."""
    if isinstance(value, tuple):
        return [value[layer % len(value)] for layer in range(num_layers)]
    return value(num_layers) if callable(value) else value


def _randomize(model: PreTrainedModel) -> None:
    """Fan-in scaled weights: with transformers' own, small ones, masks, sinks and gates would not move the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point():
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                start = torch.where(weight.isfinite() & (weight.abs() < 1e4), weight, 0)
                weight.copy_(start + 0.1 * noise)
            else:
                fan_in = weight[0].numel() if weight.ndim == 2 or "conv" in name else weight.shape[-1]
                weight.copy_(noise * fan_in**-0.5)
