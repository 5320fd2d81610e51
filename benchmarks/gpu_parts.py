"""The sections of gpu.py that need no large model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import LlamaConfig, LlamaForCausalLM
from triton.testing import do_bench

import autodeploy as ad
from autodeploy.graph.edit import PREPARE
from autodeploy.graph.meta import ROLE, SITE
from autodeploy.kernels.registry import backends
from autodeploy.metadata import fields
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.metadata.span import Full, Span, Window
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.attention import AttentionFacts
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, run_as
from passes import LowerFields, ShareMetadata

DEVICE = torch.device("cuda")
NUM_LAYERS = 32
PAGE_SIZE = 64

LAYER = Site(
    "attention",
    "layer",
    "full_attention",
    torch.bfloat16,
    DEVICE,
    AttentionFacts(num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, scale=128**-0.5),
    num_groups=1,
    page_size=PAGE_SIZE,
)


def milliseconds(run: Callable[[], Any], rep: int = 200) -> float:
    """The median of one run, once warm."""
    return do_bench(run, warmup=50, rep=rep, return_mode="median")


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def limits(_: dict[str, Any]) -> dict[str, float]:
    """Bytes read and written by a copy, TB/s; a product of two random 8192 x 8192 bfloat16 matrices, TFLOP/s."""
    source = torch.randn(1 << 30, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e9
    read = source.nbytes / milliseconds(lambda: source.view(torch.int32).amax()) / 1e9
    one, other = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / milliseconds(lambda: one @ other) / 1e9
    print(f"   copy {copy:.2f} TB/s, read {read:.2f} TB/s, matrix product {product:.0f} TFLOP/s")
    return {"copy_tb_s": copy, "read_tb_s": read, "matmul_tflop_s": product}


def nested(query_lens: list[int], context_lens: list[int], spec: LayoutSpec, num_pages: int, width: int) -> Any:
    """A step on the device: sequences with pages of their own, in random order, padded to at least two rows."""
    pages = np.random.default_rng(0).permutation(np.arange(1, num_pages)).astype(np.int32)
    tables = np.zeros((spec.num_groups, len(query_lens), width), dtype=np.int32)
    used = [-(-(q + c) // spec.page_size) for q, c in zip(query_lens, context_lens, strict=True)]
    for group in range(spec.num_groups):
        start = 0
        for row, count in enumerate(used):
            tables[group, row, :count] = pages[start : start + count]
            start += count
    total = sum(query_lens)
    return ad.nest_sequences(
        np.random.default_rng(1).integers(0, 1000, total),
        query_lens,
        context_lens,
        tables,
        np.arange(1, len(query_lens) + 1),
        spec,
        num_pages=[num_pages] * spec.num_groups,
        num_state_slots=len(query_lens) + 1,
        pad_tokens=max(2, total),
        pad_sequences=max(2, len(query_lens)),
    ).to(DEVICE)


def prepare(_: dict[str, Any]) -> list[dict[str, Any]]:
    """All metadata of a decode step of 32 layers with up to 1,024 tokens each, as CUDA graphs: our launch, torch's ops
    once for each KV group, and torch's ops for every layer.

    `kernels` and `device_us` are the kernels of one run and their time on the device; `us` is from the start of the
    graph to its end, of which an empty graph takes `empty_us`.
    """
    spans = (Full(), *map(Window, (4096, 1024, 512, 256, 128, 64, 32)))
    rows = [_prepare(64, spans[:1], per_layer=True)]
    rows += [_prepare(*sizes) for sizes in ((512, spans[:1]), (64, spans), (512, spans))]
    return rows


def _prepare(num_sequences: int, spans: tuple[Span, ...], per_layer: bool = False) -> dict[str, Any]:
    step = nested(
        [1] * num_sequences,
        [1023] * num_sequences,
        LayoutSpec(PAGE_SIZE, spans[:1] * len(spans)),
        10_000,
        1024 // PAGE_SIZE,
    )
    layout, num_tokens = step.layout, step.num_tokens
    backend = next(backend for backend in backends() if backend.name == "triton" and backend.kind == "attention")
    sites = [replace(LAYER, span=span, group=g, num_groups=len(spans)) for g, span in enumerate(spans)]
    layers = [sites[layer % len(sites)] for layer in range(NUM_LAYERS)]

    def naive(sites: list[Site]) -> list[Tensor]:
        return [value for site in sites for value in _metadata(backend, layout, num_tokens, site)]

    shared = _prepare_module(backend, layers)
    ways = {"ours": lambda: shared(layout, num_tokens), "torch, once": lambda: naive(sites)}
    if per_layer:
        ways["torch, per layer"] = lambda: naive(layers)
    row = {"sequences": num_sequences, "kv_groups": len(spans)}
    row["empty_us"] = milliseconds(captured(lambda: layout[:1, :1].add_(0))) * 1e3
    for name, run in ways.items():
        kernels = kernel_times(run)
        found = {"kernels": sum(k["count"] for k in kernels), "device_us": sum(k["us"] for k in kernels)}
        row[name] = found | {"us": milliseconds(captured(run)) * 1e3}
    print("  ", row, flush=True)
    return row


def kernel_times(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """What one run does on the device: kernels and copies by name, how many, and microseconds; the longest first."""
    run()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    rows = [{"kernel": e.key[:80], "count": e.count, "us": round(e.self_device_time_total, 2)} for e in events]
    return sorted(rows, key=lambda row: -row["us"])


def _metadata(backend: Backend, layout: Tensor, num_tokens: int, site: Site) -> list[Tensor]:
    positions = fields.position_ids(layout, num_tokens)
    return [positions, *backend.metadata(layout, num_tokens, site).values()]


def _prepare_module(backend: Backend, layers: list[Site]) -> fx.GraphModule:
    """The prepare_metadata that the passes make of every layer's metadata."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    layout, num_tokens = (fx.Proxy(graph.placeholder(name), tracer) for name in ("layout", "num_tokens"))
    for node in graph.nodes:
        ROLE.set(node, "layout")
    values = [value.node for site in layers for value in _metadata(backend, layout, num_tokens, site)]
    graph.output(tuple(values))
    SITE.set(graph.output_node(), layers[0])
    gm = fx.GraphModule(torch.nn.Module(), graph)
    for step in (ShareMetadata(), LowerFields()):
        step.apply(gm)
    gm.recompile()
    launches = [node for node in getattr(gm, PREPARE).graph.nodes if "launch_fields" in str(node.target)]
    assert len(launches) == 1
    return gm


def attention(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The decode step of one layer by each backend that runs here, 8 KV heads of 128, as CUDA graphs over layers whose
    caches are read in turn; bytes are those of the keys and values that are read."""
    rows = []
    for sequences, context in ((1, 8192), (8, 8192), (64, 1024), (64, 8192)):
        for backend in backends():
            if backend.kind == "attention" and backend.name != "reference" and backend.why_not(LAYER) is None:
                rows.append(_attention(backend, sequences, context) | {"backend": backend.name})
                rows[-1]["of_copy"] = rows[-1]["tb_s"] / results["limits"]["copy_tb_s"]
                print("  ", rows[-1], flush=True)
    return rows


def _attention(backend: Backend, sequences: int, context: int) -> dict[str, Any]:
    layers = max(1, min(16, (512 << 20) // (sequences * context * 4096) + 1))
    num_pages = sequences * context // PAGE_SIZE + 2
    step = nested(
        [1] * sequences, [context - 1] * sequences, LayoutSpec(PAGE_SIZE, (Full(),)), num_pages, context // PAGE_SIZE
    )
    rows = step.num_tokens
    shapes = [(num_pages, PAGE_SIZE, *spec.shape) for spec in backend.caches(LAYER)]
    dtypes = [spec.dtype for spec in backend.caches(LAYER)]
    caches = [
        tuple(
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        for _ in range(layers)
    ]
    query = torch.randn(1, 32, rows, 128, device=DEVICE, dtype=torch.bfloat16)
    key, value = (torch.randn(1, 8, rows, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    with run_as(DECODE):
        metadata = backend.metadata(step.layout, rows, LAYER)

    def run_layers() -> None:
        with run_as(DECODE):
            for each in caches:
                backend.append_and_attend((query, key, value, None, None, None), each, metadata, LAYER)

    run = captured(run_layers)
    seconds = milliseconds(run) / layers / 1e3
    num_bytes = sequences * context * 8 * 128 * sum(dtype.itemsize for dtype in dtypes)
    return {"sequences": sequences, "context": context, "us": seconds * 1e6, "tb_s": num_bytes / seconds / 1e12}


def host(_: dict[str, Any]) -> list[dict[str, Any]]:
    """The host's work for a greedy decode step of a small model: all but waiting for the device."""
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval().to(DEVICE, torch.bfloat16)
    rows = []
    for sequences in (1, 64):
        llm = ad.LLM(model, max_num_seqs=sequences, max_num_tokens=4096)
        prompts = [[index + 3] * 32 for index in range(sequences)]
        llm.generate(prompts, ad.SamplingParams(max_tokens=16, ignore_eos=True))
        before = replace(llm.stats)
        llm.generate(prompts, ad.SamplingParams(max_tokens=256, ignore_eos=True))
        steps = llm.stats.num_steps - before.num_steps
        copies = llm.stats.num_host_to_device_copies - before.num_host_to_device_copies
        seconds = llm.stats.host_seconds - before.host_seconds
        rows.append(
            {"sequences": sequences, "steps": steps, "host_us": seconds / steps * 1e6, "copies": copies / steps}
        )
        print("  ", rows[-1], flush=True)
    return rows
