"""Backends over optional libraries, without a GPU: what they refuse, and with which arguments they call."""

from __future__ import annotations

import sys
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import interpreted
from ragged import make_batch
from test_kernels import (
    BATCHES,
    attention_site,
    check,
    conv_site,
    make_caches,
    make_inputs,
    not_a_decode_step,
    pack,
)
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen as torch_varlen

from autodeploy.kernels import causal_conv1d_package, varlen
from autodeploy.kernels.causal_conv1d_package import PackageCausalConv1d
from autodeploy.kernels.varlen import VarlenAttention
from autodeploy.ops.spec import Backend, Site

PLAIN = replace(attention_site(dtype=torch.bfloat16), page_size=256, num_groups=1)


@pytest.fixture(autouse=True)
def triton_on_cpu() -> Any:
    with interpreted():
        yield


def changed(site: Site, **params: object) -> Site:
    return replace(site, params=site.params | params)


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (PLAIN, None),
        (replace(PLAIN, page_size=16), "pages of 16 tokens: FA2 needs a multiple of 256, FA3 is not activated"),
        (replace(PLAIN, dtype=torch.float32), "float32 is neither float16 nor bfloat16"),
        (changed(PLAIN, softcap=30.0), "varlen_attn has no soft cap"),
        (changed(PLAIN, has_sinks=True), "varlen_attn has no sinks"),
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


def call(backend: Backend, site: Site, lengths: list[tuple[int, int]], padding_tokens: int = 0) -> Tensor:
    batch = not_a_decode_step(make_batch(lengths, padding_tokens=padding_tokens))
    site = replace(site, page_size=batch.page_size)
    tensors = pack(site, batch, make_inputs(site, batch))
    return backend.call(
        tensors, make_caches(backend, site, batch), backend.metadata(batch.layout(), batch.num_tokens, site), site
    )


@pytest.mark.parametrize(("window", "left"), [(None, -1), (5, 4)])
@pytest.mark.parametrize(
    ("lengths", "name", "max_q"),
    [([(1, 9), (1, 3)], "varlen_attn", 1), ([(2, 9), (1, 3)], "varlen_attn_out", 3)],
)
def test_varlen_arguments(
    lengths: list[tuple[int, int]],
    name: str,
    max_q: int,
    window: int | None,
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
    out = call(VarlenAttention(), replace(PLAIN, window=window), lengths)
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
