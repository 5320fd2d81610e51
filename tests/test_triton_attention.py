"""The Triton backends of paged attention against the canonical op, interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_kernels
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import triton_device as triton_device
from ragged import Batch, make_batch
from test_kernels import ATTENTION_SITES, BATCHES, Inputs, attention_site, check, small_case

from autodeploy.kernels import triton_blocks, triton_decode
from autodeploy.kernels.triton_attention import BACKENDS, TritonAttention
from autodeploy.metadata.span import Chunk, Window
from autodeploy.ops.site import Site

TRITON, TRITON_FP8 = BACKENDS
CPU = torch.device("cpu")
SITES = {name: options for name, options in ATTENTION_SITES.items() if name != "float64"}
SITES |= {
    "float16": {"dtype": torch.float16},
    "float16_all": {"dtype": torch.float16, "span": Window(6), "softcap": 2.0, "has_sinks": True},
    "size_80": {"head_dim": 80, "value_dim": 80, "scale": 0.1},
    "size_96_value_40": {"head_dim": 96, "value_dim": 40, "scale": 0.1},
    "size_256": {"head_dim": 256, "value_dim": 256, "scale": 0.06},
    "group_20": {"num_heads": 20, "num_kv_heads": 1},
    "float16_alibi": {"dtype": torch.float16, "has_alibi": True, "num_kv_heads": 6},
    "window_alibi": {"span": Window(20), "has_alibi": True, "num_kv_heads": 1},
    "window_sinks": {"span": Window(20), "has_sinks": True},
    "chunk_20": {"span": Chunk(20), "has_sinks": True},
}
# Two rows of padding, and as many tokens of padding where that is to make as many tokens as rows.
STEPS = {name: (lengths, 3 if name in ("prefill", "chunk", "mixed") else 2) for name, lengths in BATCHES.items()}
STEPS |= {"longer": ([(13, 30), (1, 50), (45, 1), (1, 0)], 3)}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 keys, so that short sequences take many."""
    monkeypatch.setattr(triton_blocks, "_KEY_BYTES", 1)


def make_step(name: str) -> Batch:
    lengths, padding_tokens = STEPS[name]
    return make_batch(lengths, num_groups=2, padding_rows=2, padding_tokens=padding_tokens, spare_pages=1)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("options", SITES.values(), ids=SITES)
@pytest.mark.usefixtures("small_blocks")
def test_is_the_canonical_op(options: dict, name: str, triton_device: torch.device) -> None:
    check(TRITON, replace(attention_site(**options), device=triton_device), make_step(name))


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("name", ["decode", "longer"])
@pytest.mark.parametrize("site", ["gqa", "bfloat16_all", "window_sinks", "window_alibi"])
@pytest.mark.usefixtures("small_blocks")
def test_any_number_of_splits(
    site: str,
    name: str,
    splits: int,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_decode, "num_splits", lambda *_: splits)
    check(TRITON, replace(attention_site(**SITES[site]), device=triton_device), make_step(name))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    is_decode = draw(st.booleans())
    query = st.integers(0, 1) if is_decode else st.one_of(st.integers(0, 1), st.integers(2, 40))
    lengths = draw(st.lists(st.tuples(query, st.integers(0, 150)), min_size=1, max_size=5))
    padding_rows = draw(st.integers(0, 2))
    empty = len(lengths) + padding_rows - sum(new for new, _ in lengths)
    return make_batch(
        lengths,
        page_size=draw(st.sampled_from([1, 3, 16, 64])),
        num_groups=draw(st.integers(1, 2)),
        padding_rows=padding_rows,
        padding_tokens=empty if is_decode else draw(st.integers(0, 3)),
        spare_pages=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches(), name=st.sampled_from(sorted(SITES)), small=st.booleans(), splits=st.sampled_from([1, 2, 7]))
def test_random_batches(
    triton_device: torch.device,
    batch: Batch,
    name: str,
    small: bool,
    splits: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_decode, "num_splits", lambda *_: splits)
        if small:
            patch.setattr(triton_blocks, "_KEY_BYTES", 1)
        check(TRITON, replace(attention_site(**SITES[name]), device=triton_device), batch)


@pytest.mark.parametrize("name", ["decode", "longer"])
@pytest.mark.parametrize("site", ["bfloat16_all", "float16"])
def test_float8_cache(site: str, name: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses what float8 cannot hold of keys and values, and nothing else."""
    make_inputs = test_kernels.make_inputs

    def rounded(site: Site, batch: Batch) -> Inputs:
        inputs = make_inputs(site, batch)
        rows = [
            (query, *(x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value)), *rest)
            for query, key, value, *rest in inputs.per_sequence
        ]
        return replace(inputs, per_sequence=rows)

    monkeypatch.setattr(test_kernels, "make_inputs", rounded)
    check(TRITON_FP8, replace(attention_site(**SITES[site]), device=triton_device), make_step(name))


def token_major(tensor: torch.Tensor) -> torch.Tensor:
    """As projections give it: all heads of a token in one run."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def size_major(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 3).contiguous().transpose(1, 3)


@pytest.mark.parametrize("relayout", [token_major, size_major])
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_any_memory_layout(name: str, relayout, triton_device: torch.device) -> None:
    site, batch, tensors, caches = small_case(TRITON, replace(attention_site(), device=triton_device), BATCHES[name])
    same = [cache.clone() for cache in caches]
    metadata = TRITON.metadata(batch.layout().to(triton_device), batch.num_tokens, site)
    expected = TRITON.append_and_attend(tensors, tuple(caches), metadata, site)
    relaid = tuple(relayout(tensor) for tensor in tensors[:3])
    assert torch.equal(TRITON.append_and_attend((*relaid, *tensors[3:]), tuple(same), metadata, site), expected)
    for one, other in zip(caches, same, strict=True):
        assert torch.equal(one, other)


def test_number_of_splits() -> None:
    assert triton_blocks.num_splits(512, 128, CPU) == 1
    assert triton_blocks.num_splits(10**6, 128, CPU) == 1
    # One sequence of Llama-3-8B: its 8 heads alone would leave most of 132 multiprocessors without work.
    assert triton_blocks.num_splits(8, 128, CPU) * 8 >= 0.9 * 2 * 132
    # Never more than blocks to share.
    assert triton_blocks.num_splits(1, 1, CPU) == 1
    assert triton_blocks.num_splits(1, 8, CPU) <= 8


def test_refusals_say_why(triton_device: torch.device) -> None:
    here = {"dtype": torch.float64}, {"head_dim": 512}
    reasons = [TRITON.why_not(replace(attention_site(**options), device=triton_device)) for options in here]
    assert reasons == ["float64 is not supported by the Triton kernels", "heads of 512 are larger than 256"]


def test_needs_a_gpu() -> None:
    assert TRITON.why_not(attention_site()) == "Triton kernels need a GPU, not cpu"


def test_names_are_distinct() -> None:
    assert [backend.name for backend in BACKENDS] == ["triton", "triton_fp8"]
    assert TritonAttention().caches(attention_site())[0].dtype is torch.float32
