"""Backends over libraries, and our own kernels beside them, on a GPU: each against the canonical op."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from ragged import make_batch
from test_kernels import BATCHES, attention_site, check, conv_site, make_caches, make_inputs, pack
from torch._subclasses.fake_tensor import FakeTensorMode

from autodeploy.errors import UnsupportedFeature
from autodeploy.kernels.registry import backends
from autodeploy.metadata.span import Window
from autodeploy.ops.backend import Backend
from autodeploy.ops.site import Site

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
HEADS = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "value_dim": 128, "scale": 0.088}
SITES = {
    "plain": attention_site(dtype=torch.bfloat16, **HEADS),
    "window": attention_site(dtype=torch.bfloat16, span=Window(5), **HEADS),
    "softcap": attention_site(dtype=torch.bfloat16, **HEADS | {"softcap": 20.0}),
    "sinks": attention_site(dtype=torch.bfloat16, **HEADS | {"has_sinks": True}),
    "conv": conv_site(dtype=torch.bfloat16, channels=256, has_bias=True, activation="silu"),
    "conv_three_taps": conv_site(dtype=torch.float32, channels=64, kernel_size=3),
    "conv_eight_taps": conv_site(dtype=torch.float16, channels=200, kernel_size=8),
}
LENGTHS = {
    **BATCHES,
    "long_decode": [(1, 700), (1, 0), (1, 255), (1, 256), (1, 1500)],
    "long_mixed": [(300, 0), (1, 900), (64, 513), (1, 2), (2, 511)],
}
PAGE_SIZES = (16, 256)
OURS = ("triton", "triton_conv1d", "varlen", "flashinfer", "causal_conv1d")


@pytest.fixture(params=[backend for backend in backends() if backend.name in OURS], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def supported(backend: Backend, site: Site, page_size: int) -> Site:
    """The site on the GPU; skips the test where the backend refuses it, with its reason."""
    site = replace(site, device=GPU, page_size=page_size, num_groups=1)
    if site.kind != backend.kind:
        pytest.skip(f"for {backend.kind}")
    if reason := backend.why_not(site):
        pytest.skip(reason)
    return site


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_is_the_canonical_op(backend: Backend, site: Site, lengths: list[tuple[int, int]], page_size: int) -> None:
    site = supported(backend, site, page_size)
    options = {"page_size": page_size, "num_groups": 2, "spare_pages": 1}
    for rows, tokens in ((0, 0), (2, 2), (2, 5)):
        check(backend, site, make_batch(lengths, padding_rows=rows, padding_tokens=tokens, **options))


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(backend: Backend, seed: int) -> None:
    shuffled = random.Random(seed)
    site = shuffled.choice([site for site in SITES.values() if site.kind == backend.kind])
    page_size = shuffled.choice(PAGE_SIZES)
    site = supported(backend, site, page_size)
    lengths = [
        (shuffled.choice([0, 1, 1, 1, shuffled.randint(2, 200)]), shuffled.choice([0, shuffled.randint(1, 900)]))
        for _ in range(shuffled.randint(1, 12))
    ]
    check(backend, site, make_batch(lengths, page_size=page_size, padding_rows=seed % 3, padding_tokens=seed % 4))


@pytest.mark.parametrize("lengths", [BATCHES["decode"], BATCHES["mixed"]], ids=["decode", "mixed"])
@pytest.mark.parametrize("site", [SITES["plain"], SITES["conv"]], ids=["attention", "conv"])
def test_is_captured(backend: Backend, site: Site, lengths: list[tuple[int, int]]) -> None:
    """Replayed from a CUDA graph, a backend computes what it does when called; FlashInfer refuses in words."""
    site = supported(backend, site, 256)
    batch = make_batch(lengths, page_size=256)
    tensors, layout = pack(site, batch, make_inputs(site, batch)), batch.layout().to(GPU)
    caches = tuple(torch.ones_like(cache) for cache in make_caches(backend, site, batch))

    def run() -> torch.Tensor:
        return backend.append_and_attend(tensors, caches, backend.metadata(layout, batch.num_tokens, site), site)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    for cache in caches:
        cache.fill_(1)
    expected, after = run().clone(), [cache.clone() for cache in caches]
    graph = torch.cuda.CUDAGraph()
    if backend.name == "flashinfer":
        with pytest.raises(UnsupportedFeature, match="plans on the host"), torch.cuda.graph(graph):
            run()
        return
    with torch.cuda.graph(graph):
        out = run()
    for cache in caches:
        cache.fill_(1)
    graph.replay()
    torch.testing.assert_close([out, *caches], [expected, *after], rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [BATCHES["decode"], BATCHES["mixed"]], ids=["decode", "mixed"])
@pytest.mark.parametrize("site", [SITES["plain"], SITES["conv"]], ids=["attention", "conv"])
def test_fake_is_as_real(backend: Backend, site: Site, lengths: list[tuple[int, int]]) -> None:
    """Shapes, strides, dtype and device of the result are known without running it."""
    site = supported(backend, site, 256)
    batch = make_batch(lengths, page_size=256)
    tensors, caches = pack(site, batch, make_inputs(site, batch)), make_caches(backend, site, batch)
    metadata = backend.metadata(batch.layout().to(GPU), batch.num_tokens, site)
    with FakeTensorMode() as mode:
        fakes = [[None if t is None else mode.from_tensor(t) for t in part] for part in (tensors, caches)]
        known = {name: mode.from_tensor(tensor) for name, tensor in metadata.items()}
        fake = backend.append_and_attend(tuple(fakes[0]), tuple(fakes[1]), known, site)
    real = backend.append_and_attend(tensors, caches, metadata, site)
    assert (fake.shape, fake.stride(), fake.dtype, fake.device.type) == (
        real.shape,
        real.stride(),
        real.dtype,
        real.device.type,
    )
