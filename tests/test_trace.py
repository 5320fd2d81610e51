"""`trace`: what the canonical nodes carry, logits as in eager attention, the model left as found, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import HEAD_DIM, MODEL_TYPES, WINDOW, tiny, tokens
from torch import fx, nn
from transformers import AutoModelForCausalLM, OpenAIGPTConfig, PreTrainedModel, masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.llama import modeling_llama

import autodeploy as ad
from autodeploy.errors import NoAttentionFound, TraceError, UnsupportedFeature
from autodeploy.graph.location import module_path
from autodeploy.graph.meta import STACK_TRACE, VALUE
from autodeploy.metadata.span import Full, Window
from autodeploy.trace import trace
from autodeploy.trace.mask import Mask, read_mask

ATTENTION = torch.ops.autodeploy.attention.default
CONV = torch.ops.autodeploy.causal_conv1d.default

_SCALE = {"scale": HEAD_DIM**-0.5}
_WINDOW = {"span": f"window_{WINDOW}"}
_GEMMA = {"scale": 64**-0.5}
_SOFTCAP = {"softcap": 1.0}
_SINKS = {"sinks": True}
# What each layer asks for, in order; `sinks` stands for the tensor being there, None for a convolution.
EXPECTED: dict[str, list[dict[str, Any] | None]] = {
    "llama": [_SCALE] * 4,
    "qwen3": [_SCALE] * 4,
    "mistral": [_SCALE | _WINDOW] * 4,
    "gemma2": [_GEMMA | _SOFTCAP | _WINDOW, _GEMMA | _SOFTCAP] * 2,
    "gemma3_text": [_GEMMA | _WINDOW] * 3 + [_GEMMA],
    "gpt_oss": [_SCALE | _SINKS | _WINDOW, _SCALE | _SINKS] * 2,
    "phi3": [_SCALE] * 4,
    "opt": [{"scale": 1.0}] * 4,
    "gpt2": [_SCALE] * 4,
    "mixtral": [_SCALE] * 4,
    "lfm2": [None, _SCALE] * 2,
    "deepseek_v3": [{"scale": 24**-0.5}] * 4,
    "llama4_text": [_SCALE | {"span": f"chunk_{WINDOW}"}] * 3 + [_SCALE],
    "gemma4_text": [{"scale": 1.0} | _WINDOW, {"scale": 1.0}] * 2,
}


@cache
def traced(model_type: str) -> fx.GraphModule:
    return trace(tiny(model_type))


def canonical_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target in (ATTENTION, CONV)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_one_canonical_node_per_layer_carries_what_the_layer_asks_for(model_type: str) -> None:
    found = [
        (dict(node.kwargs) | ({"sinks": True} if len(node.args) > 3 else {})) if node.target is ATTENTION else None
        for node in canonical_nodes(traced(model_type))
    ]
    assert found == EXPECTED[model_type]


# Bit-equal everywhere: the canonical ops are eager attention's own arithmetic, and experts are grouped in both.
@pytest.mark.parametrize("shape", [(3, 17), (1, 5), (2, 1)], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_equal_eager_attention_bit_for_bit(model_type: str, shape: tuple[int, int]) -> None:
    with torch.no_grad():
        assert torch.equal(traced(model_type)(**tokens(*shape)), tiny(model_type)(**tokens(*shape)).logits)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_grouped_experts_agree_with_a_loop_over_experts(model_type: str) -> None:
    model = copy.deepcopy(tiny(model_type))
    model.set_experts_implementation("eager")
    inputs = tokens(3, 17)
    with torch.no_grad():
        want, got = model(**inputs).logits, traced(model_type)(**inputs)
    # The loop sums a token's experts in another order.
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_graph_has_two_inputs_one_output_and_the_models_own_weights(model_type: str) -> None:
    gm, model = traced(model_type), tiny(model_type)
    inputs = gm.graph.find_nodes(op="placeholder")
    assert [node.target for node in inputs] == ["input_ids", "position_ids"]
    assert all(VALUE.of(node).ndim == 2 and VALUE.of(node).dtype == torch.int64 for node in inputs)
    assert isinstance(gm.graph.output_node().args[0], fx.Node)
    theirs = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    ours = {tensor.data_ptr() for tensor in (*gm.parameters(), *gm.buffers())}
    assert ours <= theirs
    assert {tensor.data_ptr() for tensor in model.parameters()} <= ours


def test_nodes_keep_module_path_source_line_and_shape() -> None:
    for layer, node in enumerate(canonical_nodes(traced("llama"))):
        assert module_path(node) == f"model.layers.{layer}.self_attn"
        assert "modeling_llama.py" in STACK_TRACE.of(node)
        assert VALUE.of(node).shape[2:] == (4, HEAD_DIM)


def _state(model: PreTrainedModel) -> Any:
    return (
        [module.training for module in model.modules()],
        dict(vars(model.config)),
        "forward" in vars(model),
        modeling_lfm2.causal_conv1d_fn,
        masking_utils.find_packed_sequence_indices,
        sorted(ALL_ATTENTION_FUNCTIONS),
        sorted(ALL_MASK_ATTENTION_FUNCTIONS),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_transformers_are_left_as_found(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("lfm2"))
    model.set_attn_implementation("sdpa")
    model.train()
    model.lm_head.eval()
    before = _state(model)
    if fails:
        monkeypatch.setattr(modeling_lfm2.Lfm2MLP, "forward", _branch_on_data)
        with pytest.raises(TraceError):
            trace(model)
    else:
        trace(model)
    assert _state(model) == before


def test_training_mode_does_not_show_in_the_graph() -> None:
    model = copy.deepcopy(tiny("gpt2")).train()
    with torch.no_grad():
        assert torch.equal(trace(model)(**tokens(1, 5)), traced("gpt2")(**tokens(1, 5)))


def _branch_on_data(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.sum() > 0 else -hidden


def _branch_on_length(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.shape[1] < 64 else -hidden


def test_export_failure_is_a_trace_error_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", _branch_on_data)
    with pytest.raises(TraceError, match=r"torch\.export failed: GuardOnDataDependent") as caught:
        trace(tiny("llama"))
    assert caught.value.__cause__ is not None


def test_graph_that_holds_for_short_inputs_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", _branch_on_length)
    with pytest.raises(TraceError, match="sizes 2 to 63 only"):
        trace(tiny("llama"))


def test_what_is_not_a_causal_language_model_is_refused() -> None:
    for model in (nn.Linear(2, 2), tiny("llama").model):
        with pytest.raises(TraceError, match="AutoModelForCausalLM"):
            trace(model)  # pyright: ignore[reportArgumentType]


def test_attention_of_an_unknown_form_lists_near_misses() -> None:
    model = AutoModelForCausalLM.from_config(OpenAIGPTConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    model.transformer.h[0].attn.bias.mul_(2)  # the mask that scores are multiplied by
    with pytest.raises(NoAttentionFound, match=r"transformer\.h\.0\.attn.*multiplies its scores by"):
        trace(model)


# What becomes of a mask on its way to attention, and whether the canonical node still has it in words.
_CHANGES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "whole slice": (lambda mask: mask[:, :, :, : mask.shape[-1]], True),
    "doubled": (lambda mask: mask * 2.0, True),
    "sum": (lambda mask: mask + 1.0, False),
    "transposed": (lambda mask: mask.transpose(2, 3), False),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_mask_that_a_layer_changes_is_part_of_the_graph(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, is_causal = _CHANGES[change]
    _with_mask(monkeypatch, apply)
    gm = trace(tiny("llama"))
    assert [node.kwargs.get("causal", True) for node in canonical_nodes(gm)] == [is_causal] * 4
    with torch.no_grad():
        torch.testing.assert_close(gm(**tokens(2, 9)), tiny("llama")(**tokens(2, 9)).logits)


def test_attention_without_a_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_mask(monkeypatch, lambda mask: None)
    with pytest.raises(UnsupportedFeature, match=r"attention without a mask(.|\n)*model\.layers\.0\.self_attn"):
        trace(tiny("llama"))


def _with_mask(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], Any]) -> None:
    original = modeling_llama.LlamaAttention.forward

    def forward(self: Any, *args: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return original(self, *args, attention_mask=change(attention_mask), **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)


def test_mask_that_a_layer_reads_is_traced_and_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.LlamaDecoderLayer.forward

    def forward(self: Any, hidden: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return original(self, hidden + attention_mask.eq(0).sum() / 100, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    gm = trace(tiny("llama"))
    with torch.no_grad():
        torch.testing.assert_close(gm(**tokens(2, 9)), tiny("llama")(**tokens(2, 9)).logits)
    with pytest.raises(UnsupportedFeature, match="places in the sequence, or its length"):
        ad.apply(gm)


@settings(deadline=None, max_examples=30)
@given(window=st.integers(1, 300))
def test_read_mask_finds_windows(window: int) -> None:
    seen = Full() if window >= 256 else Window(window)
    assert read_mask(sliding_window_causal_mask_function(window), 256) == Mask(span=seen)


def test_read_mask_knows_full_and_two_sided_masks() -> None:
    assert read_mask(causal_mask_function, 4096) == Mask()
    assert read_mask(bidirectional_mask_function, 4096) == Mask(causal=False)
    # "Within distance 5" counts 5 itself.
    assert read_mask(sliding_window_bidirectional_mask_function(5), 4096) == Mask(causal=False, span=Window(6))


@pytest.mark.parametrize("chunk", [3, 64, 1000])
def test_read_mask_refuses_what_is_not_a_window(chunk: int) -> None:
    chunked = chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.int64))
    assert "chunked_overlay" in (read_mask(chunked, 4096).refused or "")
    prefix = or_masks(causal_mask_function, lambda batch, head, query, key: key < chunk)
    assert read_mask(prefix, 4096).refused


def test_encoder_decoders_are_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedFeature, match="encoder-decoder"):
        trace(model)
