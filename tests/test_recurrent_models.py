"""Tiny models with recurrent layers: logits and greedy answers equal transformers', however a prompt is cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from greedy import check_greedy
from torch import fx
from transformers import PreTrainedModel

import autodeploy as ad
from autodeploy.app.tiny import VOCAB_SIZE, tiny_model
from autodeploy.ops.kinds import kind_of

# The kind that each type is here for, the number of its layers, and pages that are too few for all prompts at once.
TYPES = {
    "qwen3_5_text": ("gated_delta_rule", 2, 14),
    "kimi_linear": ("gated_delta_rule", 3, 14),
    "recurrent_gemma": ("linear_recurrence", 3, 8),  # its attention sees a window
}
SIZES: dict[str, Any] = {"page_size": 4, "max_num_seqs": 4, "max_num_tokens": 16}  # so prompts come in chunks
GREEDY = ad.SamplingParams(max_tokens=10, ignore_eos=True)
PROMPTS = [torch.arange(3, 3 + n).mul(37).remainder(VOCAB_SIZE - 3).add(3).tolist() for n in (1, 5, 19, 40, 30)]


@cache
def tiny(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type)


@cache
def traced(model_type: str) -> fx.GraphModule:
    return ad.trace(tiny(model_type))


def check(model_type: str, outputs: list[ad.RequestOutput]) -> None:
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check_greedy(tiny(model_type), prompt, output.token_ids)


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_equal_eager(model_type: str) -> None:
    """Within rounding, over a border of chunks and for a length that was not traced."""
    found = [sort.name for node in traced(model_type).graph.nodes if (sort := kind_of(node.target))]
    kind, count, _ = TYPES[model_type]
    assert found.count(kind) == count
    input_ids = torch.arange(2 * 70).mul(37).remainder(VOCAB_SIZE).view(2, 70)
    positions = torch.arange(70).expand(2, 70)
    with torch.no_grad():
        want = tiny(model_type)(input_ids=input_ids, position_ids=positions).logits
        got = traced(model_type)(input_ids, positions)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("model_type", TYPES)
def test_ragged_batch_equals_transformers(model_type: str) -> None:
    check(model_type, ad.LLM(tiny(model_type), compile=False, **SIZES).generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("model_type", TYPES)
def test_preempted_equals_transformers(model_type: str) -> None:
    llm = ad.LLM(tiny(model_type), compile=False, num_pages=TYPES[model_type][2], backend="reference", **SIZES)
    check(model_type, llm.generate(PROMPTS, GREEDY))
    assert llm.stats.num_preemptions > 0
