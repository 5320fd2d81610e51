"""Causal convolution in Triton against the canonical op: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import triton_device as triton_device
from ragged import Batch, make_batch
from test_kernels import BATCHES, check, conv_site, make_caches, make_inputs, pack

from autodeploy.kernels.triton_conv1d import TritonCausalConv1d
from autodeploy.ops.site import Site

BACKEND = TritonCausalConv1d()
SITES = {
    "plain": conv_site(),
    "bias_silu": conv_site(has_bias=True, activation="silu"),
    "two_taps": conv_site(kernel_size=2, activation="swish"),
    "eight_taps": conv_site(kernel_size=8, has_bias=True),
    "two_blocks": conv_site(channels=131),
    "bfloat16": conv_site(dtype=torch.bfloat16, has_bias=True, activation="silu"),
    "float16": conv_site(dtype=torch.float16),
}


def on(site: Site, device: torch.device) -> Site:
    return replace(site, device=device)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_is_the_canonical_op(site: Site, lengths: list[tuple[int, int]], triton_device: torch.device) -> None:
    for padding_rows, padding_tokens in ((0, 0), (2, 2), (1, 3)):
        batch = make_batch(lengths, padding_rows=padding_rows, padding_tokens=padding_tokens)
        check(BACKEND, on(site, triton_device), batch)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    is_decode = draw(st.booleans())
    length = st.tuples(st.integers(0, 1 if is_decode else 9), st.integers(0, 9))
    lengths = draw(st.lists(length, min_size=1, max_size=5))
    if is_decode:
        # Rows with a token come first, as in any decode step.
        lengths.sort(reverse=True)
    rows, total = draw(st.integers(0, 2)), sum(query for query, _ in lengths)
    tokens = len(lengths) + rows - total if is_decode else draw(st.integers(0, 3))
    return make_batch(lengths, padding_rows=rows, padding_tokens=tokens)


@given(batches(), st.sampled_from(list(SITES.values())))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_batches(triton_device: torch.device, batch: Batch, site: Site) -> None:
    check(BACKEND, on(site, triton_device), batch)


@pytest.mark.parametrize("lengths", [BATCHES["decode"], BATCHES["mixed"]], ids=["decode", "mixed"])
def test_strides_do_not_matter(lengths: list[tuple[int, int]], triton_device: torch.device) -> None:
    """The input may be the transposed product of a projection, or a part of one."""
    site = on(SITES["bias_silu"], triton_device)
    batch = make_batch(lengths)
    hidden, *shared = pack(site, batch, make_inputs(site, batch))
    assert hidden is not None
    metadata = BACKEND.metadata(batch.layout().to(triton_device), batch.num_tokens, site)
    wide = torch.cat([hidden, hidden], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for view in (hidden, wide[:, hidden.shape[1] :]):
        caches = tuple(torch.ones_like(cache) for cache in make_caches(BACKEND, site, batch))
        results.append((BACKEND.append_and_attend((view, *shared), caches, metadata, site), *caches))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_refusals_say_why(triton_device: torch.device) -> None:
    for site, reason in (
        (conv_site(dtype=torch.float64), "float64 is not among float16, bfloat16 and float32"),
        (conv_site(kernel_size=1), "1 taps are not among 2 to 8"),
        (conv_site(kernel_size=9), "9 taps are not among 2 to 8"),
    ):
        assert BACKEND.why_not(on(site, triton_device)) == reason


def test_needs_a_gpu() -> None:
    assert BACKEND.why_not(conv_site()) == "Triton kernels need a GPU, not cpu"
