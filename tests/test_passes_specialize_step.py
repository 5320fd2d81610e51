"""`specialize_step`: the kind of a step is an argument of the ops that ask for it, and nothing that sizes say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import fx

import autodeploy as ad
from autodeploy.kernels import triton_attention
from autodeploy.ops.step_kind import DECODE, MIXED, run_as, takes_step_kind
from passes import SpecializeStep

ATTENTION = torch.ops.autodeploy.triton_paged_attention.default


def cached(monkeypatch: pytest.MonkeyPatch) -> fx.GraphModule:
    """A finished graph whose layers call an op that asks for the kind."""
    monkeypatch.setattr("autodeploy.kernels.support.why_not", lambda device: None)
    return ad.apply(ad.trace(tiny("llama")), backend="triton").module


def kinds(gm: fx.GraphModule) -> list[object]:
    return [node.kwargs.get("step_kind", MIXED) for node in gm.graph.nodes if takes_step_kind(node.target)]


def test_only_the_copy_for_decode_steps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = cached(monkeypatch)
    decode = ad.apply(gm, passes=[SpecializeStep()]).module
    assert kinds(gm) == [MIXED] * 4
    assert kinds(decode) == [DECODE] * 4
    assert "step_kind = 'decode'" in decode.code
    assert SpecializeStep().apply(decode) == 0, "nothing is left to say"
    assert SpecializeStep(MIXED).apply(decode) == 4


def test_what_prepares_metadata_is_told_as_well() -> None:
    graph = fx.Graph()
    layout = graph.placeholder("layout")
    plan = torch.ops.autodeploy.flashinfer_plan.default
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 64, "page_size": 4, "dtype": torch.bfloat16}
    graph.output(graph.call_function(plan, (layout, layout, layout), sizes))
    gm = fx.GraphModule(torch.nn.Module(), fx.Graph())
    gm.prepare_metadata = fx.GraphModule(torch.nn.Module(), graph)
    gm.graph.output(gm.graph.call_module("prepare_metadata", (gm.graph.placeholder("layout"),)))
    assert SpecializeStep().apply(gm) == 1
    assert kinds(gm.prepare_metadata) == [DECODE]
    assert "step_kind = 'decode'" in gm.prepare_metadata.code


@pytest.mark.parametrize(("kind", "launched"), [(MIXED, ["append", "decode", "prefill"]), (DECODE, ["decode"])])
def test_a_decode_step_launches_the_decode_kernel_alone(
    kind: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("append", "decode", "prefill"):
        monkeypatch.setattr(triton_attention, name, lambda *_, name=name: calls.append(name))
    query, cache = torch.zeros(1, 2, 3, 16), torch.zeros(2, 4, 2, 16)
    rows = [torch.zeros(size, dtype=torch.int32) for size in (3, 3, 3, 4, 3)]
    with run_as(kind):
        ATTENTION(query, query, query, None, cache, cache, *rows, scale=1.0)
    assert calls == launched


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_both_steps_are_kept_and_decode_steps_run_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU, where a model has a step of each kind."""
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
    monkeypatch.setattr(ad.LLM, "_specialize", lambda _: [SpecializeStep()])
    answers = []
    for is_warm in (False, True):
        llm = ad.LLM(tiny("llama"), max_num_seqs=2, max_num_tokens=8)
        assert llm.timings.is_warm == is_warm
        engine, ran = llm._engine, Counter()
        engine._step, engine._decode_step = (counted(step, ran) for step in (engine._step, engine._decode_step))
        answers.append([each.token_ids for each in llm.generate([[5, 6, 7], [8]], ad.SamplingParams(max_tokens=4))])
        assert list(ran.values()) == [1, 3]
    assert answers[0] == answers[1]


def counted(step: Callable[..., Any], ran: Counter) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        ran[step] += 1
        return step(*args)

    return run
