"""A tiny GGUF file becomes a plain float32 folder with the very same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodeploy.app.demo import _convert
from autodeploy.app.models import load_model

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ċ", "Ġ"]
VOCAB, HIDDEN, KEYS, INNER = len(TOKENS), 64, 32, 128
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "output_norm": (HIDDEN,),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.ffn_norm": (HIDDEN,),
    "blk.0.attn_q": (HIDDEN, HIDDEN),
    "blk.0.attn_k": (KEYS, HIDDEN),
    "blk.0.attn_v": (KEYS, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate": (INNER, HIDDEN),
    "blk.0.ffn_up": (INNER, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, INNER),
}


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A llama of one layer in the demo model's form: 4-bit matrices, tied head, byte-level tokenizer, chat template."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HIDDEN // KEYS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 5)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        weight = random.standard_normal(shape).astype(np.float32)
        q4 = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, q4), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_conversion(gguf_file: Path, tmp_path: Path) -> None:
    source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": gguf_file.name}
    expected = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).state_dict()
    _convert(gguf_file, tmp_path / "plain")
    model, tokenizer = load_model(tmp_path / "plain")
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == TOKENS.index("<|im_end|>")
    text = "ab\n a<|im_end|>"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(**source)(text).input_ids == [5, 6, 7, 3, 2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"
