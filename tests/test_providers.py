"""Backends over optional libraries, without a GPU: what they refuse, and with which arguments they call."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import interpreted
from ragged import make_batch
from spans import FULL, first
from test_kernels import (
    BATCHES,
    attention_site,
    check,
    conv_site,
    make_caches,
    make_inputs,
    pack,
)
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional
from torch.nn.attention import varlen as torch_varlen

from autodeploy.kernels import causal_conv1d_package, flashinfer, varlen
from autodeploy.kernels.causal_conv1d_package import PackageCausalConv1d
from autodeploy.kernels.flashinfer import FlashInferAttention
from autodeploy.kernels.varlen import VarlenAttention
from autodeploy.metadata.span import Span, Window
from autodeploy.ops.backend import Backend
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind, run_as

PLAIN = replace(attention_site(dtype=torch.bfloat16), page_size=256, num_groups=1)


@pytest.fixture(autouse=True)
def triton_on_cpu() -> Any:
    with interpreted():
        yield


def changed(site: Site, **params: object) -> Site:
    return replace(site, facts=replace(site.facts, **params))


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (PLAIN, None),
        (replace(PLAIN, page_size=16), "pages of 16 tokens: FA2 needs a multiple of 256, FA3 is not activated"),
        (replace(PLAIN, dtype=torch.float32), "float32 is neither float16 nor bfloat16"),
        (changed(PLAIN, softcap=30.0), "varlen_attn has no soft cap"),
        (changed(PLAIN, has_sinks=True), "varlen_attn has no sinks"),
        (changed(PLAIN, has_alibi=True), "varlen_attn has no ALiBi"),
        (changed(PLAIN, value_dim=8), "values of 8 and keys of 16 must be of one size"),
        (changed(PLAIN, head_dim=12, value_dim=12), "heads of 12 are not a multiple of 8 up to 256"),
        (changed(PLAIN, head_dim=264, value_dim=264), "heads of 264 are not a multiple of 8 up to 256"),
        (changed(PLAIN, causal=False), "attention that is not causal cannot run from a cache"),
    ],
)
def test_varlen_refuses(site: Site, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_has_block_tables", lambda: True)
    assert VarlenAttention().why_not(site) == reason


def test_varlen_needs_block_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_has_block_tables", lambda: False)
    assert VarlenAttention().why_not(PLAIN) == f"varlen_attn of torch {torch.__version__} takes no block table"


def test_varlen_takes_any_page_with_fa3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_has_block_tables", lambda: True)
    monkeypatch.setattr(varlen, "_is_fa3", lambda: True)
    assert VarlenAttention().why_not(replace(PLAIN, page_size=16)) is None


def call(backend: Backend, site: Site, lengths: list[tuple[int, int]], kind: StepKind) -> Tensor:
    batch = make_batch(lengths)
    site = replace(site, page_size=batch.page_size)
    tensors = pack(site, batch, make_inputs(site, batch))
    with run_as(kind):
        return backend.append_and_attend(
            tensors, make_caches(backend, site, batch), backend.metadata(batch.layout(), batch.num_tokens, site), site
        )


@pytest.mark.parametrize(("span", "left"), [(FULL, -1), (Window(5), 4)])
@pytest.mark.parametrize(
    ("lengths", "kind", "name", "max_q"),
    [
        ([(1, 9), (1, 3)], DECODE, "varlen_attn", 1),
        ([(1, 9), (1, 3)], MIXED, "varlen_attn_out", 2),
        ([(2, 9), (1, 3)], MIXED, "varlen_attn_out", 3),
    ],
)
def test_varlen_arguments(
    lengths: list[tuple[int, int]],
    kind: StepKind,
    name: str,
    max_q: int,
    span: Span,
    left: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real functions' signatures take what we pass, and it has the shapes that they document."""
    calls = []
    function = getattr(torch_varlen, name)

    def record(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(signature(function).bind(*args, **kwargs).arguments)
        return torch.zeros_like(calls[-1]["query"])

    monkeypatch.setattr(torch_varlen, name, record)
    out = call(VarlenAttention(), replace(PLAIN, span=span), lengths, kind)
    (passed,) = calls
    num_tokens = sum(query for query, _ in lengths)
    assert out.shape == (1, num_tokens, 6, 16)
    assert passed["query"].shape == passed.get("out", passed["query"]).shape == (num_tokens, 6, 16)
    assert passed["key"].shape == passed["value"].shape
    assert passed["key"].shape[1:] == (4, 2, 16)
    assert passed["cu_seq_q"].tolist() == [0, lengths[0][0], num_tokens]
    assert passed["seqused_k"].tolist() == [sum(lengths[0]), sum(lengths[1])]
    assert passed["block_table"].shape[0] == 2
    assert (passed["max_q"], passed["max_k"]) == (max_q, passed["block_table"].shape[1] * 4)
    assert (passed["window_size"], passed["enable_gqa"], passed["scale"]) == ((left, 0), True, 0.3)


def activate(out: Tensor, activation: str | None) -> Tensor:
    return out if activation is None else functional.silu(out)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """As the package documents it: x [1, C, L], zeros before the start."""
    padded = functional.pad(x, (weight.shape[1] - 1, 0))
    return activate(functional.conv1d(padded, weight[:, None], bias, groups=len(weight)), activation)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """As the package documents it: x [S, C]; a row whose index is negative gives zeros and leaves all states alone."""
    assert conv_state_indices is not None
    out = torch.zeros_like(x)
    for row, slot in enumerate(conv_state_indices.tolist()):
        if slot >= 0:
            inputs = torch.cat([conv_state[slot], x[row, :, None]], dim=1)
            conv_state[slot] = inputs[:, 1:]
            out[row] = causal_conv1d_fn(inputs[None], weight, bias, activation=activation)[0, :, -1]
    return out


@pytest.mark.parametrize("lengths", [*BATCHES.values(), [(1, 9), (1, 0), (1, 3)], [(1, 0), (1, 2), (0, 5)]])
@pytest.mark.parametrize("kernel_size", [2, 4])
def test_causal_conv1d_by_its_documentation(
    lengths: list[tuple[int, int]], kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update)
    monkeypatch.setitem(sys.modules, "causal_conv1d", stub)
    site = conv_site(kernel_size=kernel_size, has_bias=True, activation="silu")
    for rows, tokens in ((0, 0), (2, 2), (1, 4)):
        check(PackageCausalConv1d(), site, make_batch(lengths, padding_rows=rows, padding_tokens=tokens))


GPU = torch.device("cuda")


def test_causal_conv1d_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, site = PackageCausalConv1d(), replace(conv_site(), device=GPU)
    assert backend.why_not(conv_site()) == "causal-conv1d needs a GPU, not cpu"
    monkeypatch.setattr(causal_conv1d_package, "_is_installed", lambda: False)
    assert backend.why_not(site) == "causal-conv1d is not installed: pip install causal-conv1d"
    monkeypatch.setattr(causal_conv1d_package, "_is_installed", lambda: True)
    assert backend.why_not(site) is None
    assert backend.why_not(changed(site, kernel_size=5)) == "5 taps are not among 2 to 4"
    assert backend.why_not(replace(site, dtype=torch.float64)) == "float64 is not among float16, bfloat16 and float32"


HEADS_OF_64 = changed(PLAIN, head_dim=64, value_dim=64)


@pytest.mark.parametrize(
    ("site", "found", "reason"),
    [
        (HEADS_OF_64, "0.6.9", None),
        (replace(HEADS_OF_64, page_size=16, span=Window(5)), "0.6.14", None),
        (changed(HEADS_OF_64, softcap=30.0), "0.6.9.post1", None),
        (HEADS_OF_64, "0.6.8", "flashinfer 0.6.8 is not known here: pip install 'flashinfer-python>=0.6.9,<0.7'"),
        (HEADS_OF_64, "0.7.0", "flashinfer 0.7.0 is not known here: pip install 'flashinfer-python>=0.6.9,<0.7'"),
        (changed(HEADS_OF_64, has_sinks=True), "0.6.9", "sinks are not supported"),
        (changed(HEADS_OF_64, has_alibi=True), "0.6.9", "ALiBi is not supported"),
        (PLAIN, "0.6.9", "heads of 16 and 16 are not both one of 64, 128 and 256"),
        (replace(HEADS_OF_64, dtype=torch.float32), "0.6.9", "float32 is neither float16 nor bfloat16"),
    ],
)
def test_flashinfer_refuses(site: Site, found: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "version", lambda _: found)
    assert FlashInferAttention().why_not(site) == reason


def test_flashinfer_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flashinfer, "version", missing)
    expected = "flashinfer is not installed: pip install 'flashinfer-python>=0.6.9,<0.7'"
    assert FlashInferAttention().why_not(HEADS_OF_64) == expected


@pytest.mark.parametrize(("span", "left"), [(FULL, -1), (Window(5), 4)])
@pytest.mark.parametrize(
    ("lengths", "kind", "name"),
    [([(1, 9), (1, 3), (1, 0)], DECODE, "fa2"), ([(2, 9), (1, 3), (0, 7)], MIXED, "fa3")],
    ids=["decode", "mixed"],
)
def test_flashinfer_arguments(
    lengths: list[tuple[int, int]], kind: StepKind, name: str, span: Span, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan and a run are asked, in the order in which FlashInfer's wrappers of these versions ask it."""
    asked, plans, runs = [], [], []

    def get_module(*key: object) -> SimpleNamespace:
        asked.append(key)
        return SimpleNamespace(plan=lambda *args: plans.append(args) or [7, 8, 9], paged_run=lambda **k: runs.append(k))

    module = ModuleType("flashinfer")
    prefill = SimpleNamespace(get_batch_prefill_module=get_module)
    utils = SimpleNamespace(determine_attention_backend=lambda *_: "fa3")
    for path, stub in (("flashinfer", module), ("flashinfer.prefill", prefill), ("flashinfer.utils", utils)):
        monkeypatch.setitem(sys.modules, path, stub)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(flashinfer, "_PARTIAL_BYTES", 64)
    out = call(FlashInferAttention(), replace(HEADS_OF_64, span=span), lengths, kind)

    bf16 = torch.bfloat16
    assert asked == [(name, bf16, bf16, bf16, torch.int32, 64, 64, 0, span != FULL, False, False)] * 2
    (plan,) = plans
    starts, pages, seen = plan[3:6]
    assert plan[6:15] == (3, 3, 6, 2, 4, False, 64, 64, True)
    assert plan[15:] == ((left, -1, False, 0) if name == "fa2" else (left,))
    assert starts.tolist() == [0, *itertools.accumulate(query for query, _ in lengths)]
    # The positions of whole pages, of which the last is used in part, from the first that the window sees.
    firsts = [first(span, context) // 4 * 4 for _, context in lengths]
    assert seen.tolist() == [query + context - first for (query, context), first in zip(lengths, firsts, strict=True)]
    assert pages.diff().tolist() == [-(-length // 4) for length in seen.tolist()]
    (run,) = runs
    assert run["plan_info_vec"] == [7, 8, 9]
    assert run["o"].data_ptr() == out.data_ptr()
    assert run["q"].shape == run["o"].shape == (3, 6, 64)
    assert run["paged_k_cache"].shape[1:] == (4, 2, 64)
    assert run["paged_kv_indptr"].tolist() == pages.tolist()
    assert (run["paged_kv_indices"][: pages[-1]] > 0).all()
    assert (run["window_left"], run["logits_soft_cap"], run["sm_scale"]) == (left, 0.0, 0.3)


def test_flashinfer_plans_once_for_each_key() -> None:
    """Two layers of one key ask for equal plans, which sharing makes one; a layer with more heads asks for its own."""
    backend = FlashInferAttention()
    wide = changed(HEADS_OF_64, num_heads=8)
    graph = fx.Graph()
    proxy = fx.Proxy(graph.placeholder("layout"), GraphAppendingTracer(graph))
    for site in (HEADS_OF_64, replace(HEADS_OF_64, path="another layer"), wide):
        backend.metadata(proxy, 4, site)
    plans = [node for node in graph.nodes if node.target is torch.ops.autodeploy.flashinfer_plan.default]
    keys = {(str(node.kwargs), tuple(str(getattr(arg, "target", arg)) for arg in node.args)) for node in plans}
    assert (len(plans), len(keys)) == (3, 2)
