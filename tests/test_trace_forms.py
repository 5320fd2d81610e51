"""Models that wrote their attention themselves: `trace` finds its form, and an LLM answers as transformers does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from greedy import check_greedy
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaModel

import autodeploy as ad
from autodeploy.errors import AutodeployError, UnsupportedFeature
from autodeploy.graph.meta import FORM
from autodeploy.trace import trace

_TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8, "max_position_embeddings": 64}
_XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64}
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_MODELS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "falcon": _FALCON,
    "falcon, grouped": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gptj": _GPT,
    "openai-gpt": _GPT,
    "codegen": _GPT,
    "gpt_neo": _NEO | {"attention_types": [[["global", "local"], 1]]},
    "xglm": _XGLM,
    "gpt_neox_japanese": _BERT | {"intermediate_multiple_size": 2},
    "megatron-bert": _BERT | {"intermediate_size": 64, "is_decoder": True},
}
_REFUSED: dict[str, tuple[dict[str, Any], type[AutodeployError], str]] = {
    # Its distances are rounded to bfloat16.
    "falcon": (_FALCON | {"alibi": True}, UnsupportedFeature, "a bias that is neither a mask .* nor ALiBi"),
}


def make(model_type: str, sizes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_TOKENS | sizes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():  # with weights as small as transformers draws them, attention would hardly show
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.1 if weight.dim() < 2 else weight.shape[-1] ** -0.5))
    return model


@pytest.mark.parametrize("name", _MODELS)
def test_a_form_that_a_model_wrote_is_found_and_answers_as_transformers_does(name: str) -> None:
    model = make(name.split(",")[0], _MODELS[name])
    gm = trace(model)
    inputs = {"input_ids": torch.randint(3, 96, (3, 19)), "position_ids": torch.arange(19).repeat(3, 1)}
    given = [inputs[node.name] for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        torch.testing.assert_close(gm(*given), model(inputs["input_ids"]).logits, atol=1e-4, rtol=1e-4)
    assert len([node for node in gm.graph.nodes if FORM.on(node)]) == 2
    prompts = [torch.randint(3, 96, (length,)).tolist() for length in (3, 17, 1, 30)]
    outputs = ad.LLM(model, compile=False).generate(prompts, ad.SamplingParams(max_tokens=12, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        check_greedy(model, prompt, output.token_ids)


@pytest.mark.parametrize("model_type", _REFUSED)
def test_a_form_that_nobody_can_cache_is_refused_by_name(model_type: str) -> None:
    sizes, error, message = _REFUSED[model_type]
    with pytest.raises(error, match=message):
        ad.apply(trace(make(model_type, sizes)))


def test_a_mask_over_what_is_filled_to_the_shape_of_activations_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As multimodal models have it: text has no image tokens, of which each would see all others of its image."""
    original = LlamaModel.forward

    def forward(self: LlamaModel, input_ids: Tensor, **kwargs: Any) -> Any:
        no_image = torch.zeros_like(self.embed_tokens(input_ids), dtype=torch.int)[..., 0] - 1
        monkeypatch.setattr(
            modeling_llama, "create_causal_mask", partial(create_causal_mask, block_sequence_ids=no_image)
        )
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    gm = trace(make("llama", _BERT | {"intermediate_size": 64}))
    assert [dict(node.kwargs)["scale"] for node in gm.graph.nodes if FORM.on(node)] == [8**-0.5] * 2
    ad.apply(gm)
