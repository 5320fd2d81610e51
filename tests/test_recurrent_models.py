"""Tiny models with recurrent layers: logits and greedy answers equal transformers', however a prompt is cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from greedy import check_greedy
from poison import by_head, poison_each_step
from torch import fx
from transformers import PreTrainedModel

import autodeploy as ad
from autodeploy.app.tiny import VOCAB_SIZE, tiny_model
from autodeploy.errors import UnsupportedFeature
from autodeploy.ops.kinds import kind_of, kinds

# Inductor loads a module of torch's that warns about torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

# The kind that each type is here for, the number of its layers, and pages that are too few for all prompts at once.
TYPES = {
    "qwen3_5_text": ("gated_delta_rule", 2, 14),
    "kimi_linear": ("gated_delta_rule", 3, 14),
    "recurrent_gemma": ("linear_recurrence", 3, 8),  # its attention sees a window
    "rwkv": ("wkv", 4, None),  # no pages at all
    "xlstm": ("mlstm", 4, None),
    "mamba2": ("ssd", 4, None),
    "bamba": ("ssd", 2, 14),
    "mamba": ("selective_scan", 4, None),
    "jamba": ("selective_scan", 2, 14),
    "minimax": ("ssd", 2, 14),
}
WITH_PAGES = [name for name, (*_, num_pages) in TYPES.items() if num_pages]
PAGE_SIZE = 4
SIZES: dict[str, Any] = {"page_size": PAGE_SIZE, "max_num_seqs": 4, "max_num_tokens": 16}  # so prompts come in chunks
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
    inputs = {"input_ids": input_ids, "position_ids": torch.arange(70).expand(2, 70)}
    names = [str(node.target) for node in traced(model_type).graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        want = tiny(model_type)(**{name: inputs[name] for name in names}, use_cache=False).logits
        got = traced(model_type)(*(inputs[name] for name in names))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("model_type", TYPES)
def test_ragged_batch_equals_transformers(model_type: str) -> None:
    check(model_type, ad.LLM(tiny(model_type), compile=False, **SIZES).generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("model_type", WITH_PAGES)
def test_preempted_equals_transformers(model_type: str) -> None:
    llm = ad.LLM(tiny(model_type), compile=False, num_pages=TYPES[model_type][2], backend="reference", **SIZES)
    check(model_type, llm.generate(PROMPTS, GREEDY))
    assert llm.stats.num_preemptions > 0


@pytest.mark.parametrize("model_type", TYPES)
def test_a_request_may_start_again_at_any_step(model_type: str) -> None:
    engine = ad.LLM(tiny(model_type), compile=False, **SIZES)._engine
    prompts, params = PROMPTS[2:4], ad.SamplingParams(max_tokens=5, ignore_eos=True)
    for when in range(8):  # the first three steps are prompts
        requests = engine.add_many(prompts, [params] * 2)
        for _ in range(when):
            engine.step()
        engine._scheduler.put_back()
        while engine.has_work:
            engine.step()
        for request, prompt in zip(requests, prompts, strict=True):
            check_greedy(tiny(model_type), prompt, request.token_ids)


@pytest.mark.parametrize("model_type", TYPES)
def test_what_nobody_owns_is_neither_read_nor_written(model_type: str) -> None:
    llm = ad.LLM(tiny(model_type), compile=False, **SIZES)
    poison_each_step(llm._engine, ad.apply(traced(model_type), page_size=PAGE_SIZE).cache_specs, by_head)
    check(model_type, llm.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("model_type", ["mamba2"])
def test_compiled_equals_transformers(model_type: str) -> None:
    check(model_type, ad.LLM(tiny(model_type), **SIZES).generate(PROMPTS, GREEDY))


@pytest.mark.parametrize(
    ("kind", "argument"), [("ssd", "z"), ("ssd", "seq_idx"), ("ssd", "initial_states"), ("selective_scan", "seq_idx")]
)
def test_scans_refuse_what_would_change_them(kind: str, argument: str) -> None:
    door, *_ = next(sort.doors for sort in kinds() if sort.name == kind)
    given = dict.fromkeys(("hidden_states", "dt", "A", "B", "C", "chunk_size"))
    with pytest.raises(UnsupportedFeature, match=argument):
        door.function(**given, **{argument: torch.zeros(1)})
