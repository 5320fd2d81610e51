"""Types of causal language models that transformers knows, and a tiny model with random weights of each."""

from __future__ import annotations

from transformers import PreTrainedModel

from autodeploy.app.tiny import VOCAB_SIZE, WINDOW, tiny_model

__all__ = ["TYPES", "VOCAB_SIZE", "WINDOW", "tiny"]

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


def tiny(model_type: str, num_layers: int = 4, attn_implementation: str = "eager") -> PreTrainedModel:
    """The model of `model_type` in float32 and evaluation mode, the same weights each time.

    Raises UnknownName for an unknown type and TraceError for one that transformers cannot build.
    """
    return tiny_model(model_type, attn_implementation, num_layers=num_layers)
