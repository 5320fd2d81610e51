"""Tiny models with random weights of any type that transformers knows, without a download.

A config class is instantiated with its defaults. Sizes are shrunk by the names of its fields, and fields with an entry
per layer to layers of every sort; no rule names a model. Hidden size 64, 4 heads of size 16, 2 key-value heads where
they are grouped, windows and chunks of 8 tokens, 128 tokens, 512 positions, 4 layers, or one for each sort.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodeploy.errors import TraceError, UnknownName

VOCAB_SIZE = 128
WINDOW = 8
NUM_LAYERS, MOST_LAYERS = 4, 6
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM, _RANK, _POSITIONS = 64, 96, 4, 2, 16, 32, 512

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
_SIZES: tuple[tuple[int, str], ...] = (
    (
        _HIDDEN,
        "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim dim lru_width backbone_hidden_size "
        "hidden_size_global adapter_in_dim pronunciation_embed_dim shape_embed_dim embedding_dim input_embedding_size",
    ),
    (
        _INNER,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size n_inner dff "
        "ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
        "dense_intermediate_size intermediate_size_mlp dim_ff shared_experts_intermediate_size "
        "expert_ffn_hidden_size feed_forward_size",
    ),
    (
        _HEADS,
        "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads "
        "swa_num_attention_heads linear_num_value_heads index_n_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts n_mamba_heads attention_heads num_decoder_attention_heads num_encoder_attention_heads",
    ),
    (
        _KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k top_k moe_top_k n_group num_expert_group num_kv_shared_layers",
    ),
    (
        _HEAD_DIM,
        "head_dim d_head d_kv dim_head global_head_dim swa_head_dim qk_nope_head_dim v_head_dim kv_channels "
        "attention_head_size linear_key_head_dim linear_value_head_dim index_head_dim swa_v_head_dim "
        "state_size ssm_state_size mamba_d_state mamba_d_head mamba_head_dim mamba_headdim linear_head_dim "
        "hidden_size_per_layer_input",
    ),
    (_HEAD_DIM // 2, "qk_rope_head_dim rotary_dim time_step_rank mamba_dt_rank adapter_rank laurel_rank"),
    (2 * _HIDDEN // _HEAD_DIM, "mamba_n_heads mamba_num_heads"),
    (_HEAD_DIM + _HEAD_DIM // 2, "qk_head_dim"),
    (_RANK, "kv_lora_rank q_lora_rank o_lora_rank"),
    (1, "mamba_n_groups mamba_ngroups n_groups topk_group first_k_dense_replace num_dense_layers"),
    (2 * _HIDDEN, "mamba_d_ssm attention_hidden_size"),
    (2 * _HIDDEN // _HEADS, "attention_head_dim"),
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input decoder_vocab_size pronunciation_vocab_size shape_vocab_size"),
    (
        _POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
        "max_target_positions seq_length",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size local_attention chunk_size "
        "mamba_chunk_size attention_chunk_size index_topk",
    ),
)
_FIELDS: dict[str, Any] = {name: size for size, names in _SIZES for name in names.split()}
# A softcap this low bends the small scores of random weights visibly.
_FIELDS |= {"attn_logit_softcapping": 1.0, "is_decoder": True, "use_cache": False, "block_auto_adjust_ff_dim": False}
_FIELDS |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "cls_token_id": 4}
_FIELDS |= {"attn_layer_period": 2, "attn_layer_offset": 1}
_OFF = ("router_jitter_noise", "input_jitter_noise", "layerdrop")
# Switched off, or one alone, where the default is.
_AT_MOST = ("num_kv_shared_layers", "num_experts_per_tok", "hidden_size_per_layer_input")
# What some defaults leave open.
_OPEN = {"head_dim": _HEAD_DIM, "num_key_value_heads": _HEADS, "n_routed_experts": _HEADS, "num_experts_per_tok": 2}
_OPEN |= {"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "attn_layer_indices": [1, 3]}
_FULL = "full_attention"


def tiny_model(
    model_type: str, attn_implementation: str = "eager", overrides: dict[str, Any] | None = None, **options: int
) -> PreTrainedModel:
    """The model of `model_type` in float32 and evaluation mode on the CPU, the same weights each time.

    `options` and `overrides` are those of `tiny_config`. Raises UnknownName, or TraceError for a type whose defaults
    make no model once they are small.
    """
    try:
        config = tiny_config(model_type, overrides, **options)
        torch.manual_seed(0)  # for what transformers draws itself
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    except UnknownName:
        raise
    except Exception as error:  # validators of configs, missing libraries, sizes that do not fit: no common base
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise TraceError(
            f"no tiny model could be made: {type(error).__name__}: {reason}",
            where=model_type,
            fix="give a folder or a hub id, whose configuration is complete",
        ) from error
    _randomize(model)
    return model.eval()


def tiny_config(
    model_type: str, overrides: dict[str, Any] | None = None, num_layers: int = NUM_LAYERS
) -> PreTrainedConfig:
    """The default configuration of `model_type`, shrunk. `overrides` are fields of its own, taken as they are.

    Raises UnknownName, and whatever transformers raises for a type whose defaults make no configuration.
    """
    if model_type not in CONFIG_MAPPING:
        raise UnknownName("model type", model_type, CONFIG_MAPPING)
    return _shrink(CONFIG_MAPPING[model_type], num_layers, overrides or {})


def _shrink(config_class: type[PreTrainedConfig], num_layers: int, overrides: dict[str, Any]) -> PreTrainedConfig:
    base = config_class()
    given = {field.name: _value(base, field.name) for field in dataclasses.fields(config_class)}
    shrunk = {name: small for name, value in given.items() if (small := _small(name, value)) is not value}
    layers_name = next((name for name in _LAYER_COUNTS if isinstance(given.get(name), int)), None)
    if layers_name is not None:
        layers = _layers(given, given[layers_name], num_layers)
        shrunk |= _lists(given, layers, given[layers_name]) | {layers_name: len(layers)}
    if (given.get("kv_lora_rank") or "attention_hidden_size" in given) and "num_key_value_heads" in given:
        shrunk["num_key_value_heads"] = _HEADS  # latent attention has a key head for each query head
    for name, part in given.items():
        if isinstance(part, PreTrainedConfig):
            shrunk[name] = _shrink(type(part), num_layers, {})
    return config_class(**(shrunk | _incomplete(given, num_layers) | overrides))


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
        return min(value, _FIELDS[name]) if name in _AT_MOST else _FIELDS[name]
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB_SIZE:
        return VOCAB_SIZE - 1
    is_rate = isinstance(value, float | int) and not isinstance(value, bool)
    if is_rate and ("dropout" in name or name.endswith("pdrop") or name in _OFF):
        return type(value)(0)
    return value


def _incomplete(given: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Fields that defaults leave open, or whose entries are no layers, as a model of a few layers needs them."""
    found: dict[str, Any] = {name: value for name, value in _OPEN.items() if name in given and given[name] is None}
    if {"expand", "num_heads", "state_size"} <= given.keys():
        found |= {"num_heads": given["expand"] * _HIDDEN // _HEAD_DIM, "n_groups": 1}
    if given.get("languages") and given.get("default_language", "") is None:
        found["default_language"] = given["languages"][0]
    if given.get("layer_types", ()) is None and (other := _other_sort(given)):
        found["layer_types"] = [(other, _FULL)[layer % 2] for layer in range(num_layers)]
    pattern = given.get("attention_types")
    if isinstance(pattern, list) and pattern and isinstance(pattern[0], list):
        found["attention_types"] = [[names, num_layers // len(names)] for names, _ in pattern[:1]]
    return found


def _layers(given: dict[str, Any], num_given: int, num_layers: int) -> list[int]:
    """Which of the default layers to keep: one of each sort in turns."""
    lists = _per_layer(given, num_given).values()
    sorts: dict[str, list[int]] = {}
    for layer in range(num_given):
        sorts.setdefault(repr([value[layer] for value in lists]), []).append(layer)
    turns = list(sorts.values())[:MOST_LAYERS]
    num_layers = max(num_layers, len(turns))
    return [turns[i % len(turns)][i // len(turns) % len(turns[i % len(turns)])] for i in range(num_layers)]


def _per_layer(given: dict[str, Any], num_given: int) -> dict[str, Any]:
    """The fields with one entry per layer; indices of layers are none."""
    lists = {k: v for k, v in given.items() if isinstance(v, list | tuple) and len(v) == num_given > 1}
    return {name: value for name, value in lists.items() if not name.endswith(("_idxs", "_indices"))}


def _lists(given: dict[str, Any], layers: list[int], num_given: int) -> dict[str, Any]:
    lists = {k: [_small(k, v[layer]) for layer in layers] for k, v in _per_layer(given, num_given).items()}
    if len(set(lists.get("layer_types", ()))) == 1 and (other := _other_sort(given)):
        lists["layer_types"] = [(other, _FULL)[layer % 2] for layer in range(len(layers))]
    return lists


def _other_sort(given: dict[str, Any]) -> str | None:
    """Of a hybrid whose defaults show attention or nothing: what its other layers are called; None for others."""
    if not given.get("num_attention_heads"):
        return None
    sorts = {"mamba_": "linear_attention", "conv_": "conv"}
    return next((sort for prefix, sort in sorts.items() if any(name.startswith(prefix) for name in given)), None)


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
