"""The sections of gpu.py that run a model of the shape of Llama-3-8B: random weights, bfloat16, 32 layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from gpu_parts import DEVICE, captured, kernel_times, milliseconds, nested
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import autodeploy as ad
from autodeploy.inductor.lower import lower
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.ops.cache import Cache, PoolSizes
from autodeploy.ops.step_kind import DECODE
from autodeploy.runtime.caches import allocate_caches
from autodeploy.runtime.sampler import best_tokens
from passes import SpecializeStep

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
BATCHES = ((1, 1024), (8, 1024), (64, 1024), (1, 8192), (8, 8192), (64, 8192))
PEER_BATCHES = ((1, 1024), (64, 1024), (8, 1024))
PREFILL = 8192


class _Compiled(NamedTuple):
    step: Callable[..., Tensor]
    decode_step: Callable[..., Tensor]
    spec: LayoutSpec
    caches: tuple[Cache, ...]


@cache
def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    torch.set_default_dtype(torch.float32)
    return model


@cache
def _compiled() -> _Compiled:
    start = time.perf_counter()
    model = _model()
    result = ad.apply(ad.trace(model))
    assert result.layout_spec is not None
    decode = ad.apply(result.module, passes=[SpecializeStep()]).module
    lowered = lower(result.module, model, result.layout_spec, result.cache_specs, result.report, decode=decode)
    print(f"   {result.report.ledger}; traced and compiled in {time.perf_counter() - start:.0f} s", flush=True)
    return _Compiled(lowered.bind(model), lowered.bind(model, DECODE), result.layout_spec, result.cache_specs)


def _weight_bytes() -> int:
    """What a step must read of the weights: all but the embedding, of which it needs one row per token."""
    model = _model()
    return sum(weight.nbytes for weight in model.parameters()) - model.get_input_embeddings().weight.nbytes


def _runner(sequences: int, query: int, context: int) -> Callable[[], Tensor]:
    """A step of `sequences` rows with `query` new tokens each, `context` tokens long after it, over random caches."""
    mixed, decode_step, spec, specs = _compiled()
    step = decode_step if query == 1 else mixed
    num_pages = sequences * -(-context // spec.page_size) + 1
    width = max(64, -(-context // spec.page_size))
    inputs = nested([query] * sequences, [context - query] * sequences, spec, num_pages, width)
    caches = allocate_caches(specs, PoolSizes((num_pages,), spec.page_size, sequences + 1), DEVICE)
    for tensor in caches:
        tensor.normal_()
    return lambda: best_tokens(step(inputs.input_ids, inputs.layout, *caches))


def _fits(sequences: int, context: int) -> bool:
    free, _ = torch.cuda.mem_get_info()
    return sequences * context * 32 * 4096 < free - (2 << 30)


@torch.no_grad()
def decode(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A decode step, prepare_metadata and the choice of the best token included, as one CUDA graph.

    The limit is reading all weights and the cached keys and values once, at the measured bandwidth of a copy.
    """
    rows = []
    bandwidth = results["limits"]["copy_tb_s"] * 1e12
    _compiled()
    for sequences, context in BATCHES:
        torch.cuda.empty_cache()
        if not _fits(sequences, context):
            print(f"   {sequences} x {context} does not fit into this device")
            continue
        limit = (_weight_bytes() + sequences * context * 32 * 4096) / bandwidth * 1e3
        ours = milliseconds(captured(_runner(sequences, 1, context)), rep=500)
        rows.append(
            {"sequences": sequences, "context": context, "ms": ours, "limit_ms": limit, "of_limit": limit / ours}
        )
        print("  ", rows[-1], flush=True)
    return rows


@torch.no_grad()
def transformers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """transformers' own decode step: SDPA, static cache, torch.compile with CUDA graphs; beside ours of this file."""
    rows = []
    for sequences, context in PEER_BATCHES:
        row = {"sequences": sequences, "context": context, "ms": _peer(sequences, context)}
        ours = [r["ms"] for r in results["decode"] if (r["sequences"], r["context"]) == (sequences, context)]
        rows.append(row | {"ours_faster_by": row["ms"] / ours[0]})
        print("  ", rows[-1], flush=True)
    return rows


def _peer(sequences: int, context: int) -> float:
    model = _model()
    torch._dynamo.reset()
    cached = StaticCache(config=model.config, max_cache_len=context)
    prompt = torch.ones(sequences, 16, dtype=torch.int64, device=DEVICE)
    model(prompt, past_key_values=cached, cache_position=torch.arange(16, device=DEVICE))
    compiled = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    token = torch.ones(sequences, 1, dtype=torch.int64, device=DEVICE)
    position = torch.tensor([context - 1], device=DEVICE)

    def run() -> Tensor:
        out = compiled(token, position_ids=position[None], past_key_values=cached, cache_position=position)
        return out.logits[:, -1].argmax(-1)

    for _ in range(4):
        run()
    spent = milliseconds(run, rep=500)
    torch._dynamo.reset()
    return spent


@torch.no_grad()
def prefill(results: dict[str, Any]) -> dict[str, Any]:
    """One prompt of 8,192 tokens: operations of its matrix products and causal attention per second.

    The peer is transformers' eager forward with SDPA.
    """
    config = _model().config
    weights = _weight_bytes() / 2 - config.vocab_size * config.hidden_size
    pairs = PREFILL * (PREFILL + 1) / 2
    operations = 2 * weights * PREFILL + 4 * pairs * config.hidden_size * config.num_hidden_layers
    rate = results["limits"]["matmul_tflop_s"]
    ours = milliseconds(_runner(1, PREFILL, PREFILL), rep=2000)
    prompt = torch.ones(1, PREFILL, dtype=torch.int64, device=DEVICE)
    peer = milliseconds(lambda: _model()(prompt, use_cache=False, logits_to_keep=1), rep=2000)
    found = {
        "tokens": PREFILL,
        "ms": ours,
        "tflop_s": operations / ours / 1e9,
        "of_matmul": operations / ours / 1e9 / rate,
        "transformers_eager_ms": peer,
        "of_transformers": peer / ours,
    }
    print("  ", found)
    return found


@torch.no_grad()
def profile(_: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Time of each kernel in a step, in microseconds, the longest first."""
    found = {}
    for name, sizes in {"decode 1 x 1024": (1, 1, 1024), "decode 64 x 1024": (64, 1, 1024)}.items():
        found[name] = _kernels(captured(_runner(*sizes)))
    found["prefill 8192"] = _kernels(_runner(1, PREFILL, PREFILL))
    return found


def _kernels(run: Callable[[], Any], most: int = 14) -> list[dict[str, Any]]:
    rows = kernel_times(run)
    total = {"kernel": "all", "count": sum(r["count"] for r in rows), "us": round(sum(r["us"] for r in rows), 1)}
    for row in (total, *rows[:most]):
        print(f"   {row['us']:9.1f} us {row['count']:5} {row['kernel']}")
    return [total, *rows[:most]]
