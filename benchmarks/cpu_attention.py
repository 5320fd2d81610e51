"""Paged attention on a CPU: the sdpa backend against compiled flex_attention and the reference, on the same batches.

    python benchmarks/cpu_attention.py [--threads 2] [--repeats 31]

Head shapes are SmolLM2-135M's. Contenders take turns within each repeat, so that a busy machine slows all alike; the
figures are medians in microseconds, ratios the medians of each turn's ratio. `limit_micros` is the time to read the
batch's keys and values once at the bandwidth that a large copy reaches here. Writes results/cpu_attention.json next to
this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from autodeploy.kernels.registry import backends
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS
from autodeploy.ops.kinds.attention import AttentionFacts
from autodeploy.ops.site import Site

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 9, 3, 64, 16
# (sequences, tokens of each once the step is written, new tokens of each)
CASES = [(1, 128, 1), (32, 128, 1), (1, 2048, 1), (32, 2048, 1), (1, 256, 256), (1, 2048, 256), (32, 128, 64)]
SITE = Site(
    kind="attention",
    path="benchmark",
    layer_type="full_attention",
    dtype=torch.float32,
    device=torch.device("cpu"),
    num_groups=1,
    page_size=PAGE_SIZE,
    facts=AttentionFacts(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM, scale=HEAD_DIM**-0.5),
)


def make_layout(num_seqs: int, seq_len: int, query_len: int) -> Tensor:
    """Sequences of one length over shuffled pages."""
    pages = -(-seq_len // PAGE_SIZE)
    table = (torch.randperm(num_seqs * pages, dtype=torch.int32) + 1).view(num_seqs, pages)
    lengths = torch.tensor([query_len, seq_len - query_len, 0, 1], dtype=torch.int32).expand(num_seqs, -1)
    return torch.cat([lengths, table], dim=1)


def backend_step(name: str, layout: Tensor, num_tokens: int) -> Callable[[], Tensor]:
    """One call of the cached op, its metadata made beforehand as prepare_metadata does for all layers."""
    backend = next(b for b in backends() if b.name == name and b.kind == "attention")
    num_pages = int(layout[:, NUM_FIXED_COLUMNS:].max()) + 1
    caches = tuple(torch.randn(num_pages, PAGE_SIZE, *spec.shape) for spec in backend.caches(SITE))
    query, key, value = (
        torch.randn(1, num_tokens, n, HEAD_DIM).transpose(1, 2) for n in (NUM_HEADS, *[NUM_KV_HEADS] * 2)
    )
    metadata = backend.metadata(layout, num_tokens, SITE)
    return lambda: backend.append_and_attend((query, key, value, None, None, None), caches, metadata, SITE)


def flex_step(layout: Tensor, query_len: int) -> Callable[[], Tensor]:
    """Compiled flex_attention over the pages in place; without the write of new tokens, which is in its favour."""
    num_seqs = len(layout)
    table = layout[:, NUM_FIXED_COLUMNS:]
    num_pages = int(table.max()) + 1
    key, value = (torch.randn(1, NUM_KV_HEADS, num_pages * PAGE_SIZE, HEAD_DIM) for _ in range(2))
    query = torch.randn(num_seqs, query_len, NUM_HEADS, HEAD_DIM).transpose(1, 2)
    mask = paged_mask(table, num_pages, int(layout[0, 1]), query_len)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask, scale=SITE.facts.scale, enable_gqa=True)


def paged_mask(table: Tensor, num_pages: int, context_len: int, query_len: int) -> BlockMask:
    """Pages that a query block sees wholly are full blocks, the others that it sees are masked ones."""
    num_seqs, pages = table.shape
    logical = torch.full((num_seqs, num_pages), -1, dtype=torch.int32)
    logical.scatter_(1, table.long(), torch.arange(pages, dtype=torch.int32).expand(num_seqs, -1))

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        page = logical[b, kv // PAGE_SIZE]
        return (page >= 0) & (page * PAGE_SIZE + kv % PAGE_SIZE <= q + context_len)

    block = min(query_len, 64)
    first = torch.arange(0, query_len, block) + context_len
    num_full, num_seen = (first + 1) // PAGE_SIZE, (first + block - 1) // PAGE_SIZE + 1
    indices = torch.zeros(2, num_seqs, 1, len(first), num_pages, dtype=torch.int32)
    indices[0, :, 0, :, :pages] = table[:, None]
    for i, (full, end) in enumerate(zip(num_full.tolist(), num_seen.tolist(), strict=True)):
        indices[1, :, 0, i, : end - full] = table[:, full:end]
    counts = torch.stack([num_full, num_seen - num_full]).int()[:, None, None].expand(-1, num_seqs, 1, -1).contiguous()
    return BlockMask.from_kv_blocks(
        counts[1],
        indices[1],
        counts[0],
        indices[0],
        BLOCK_SIZE=(block, PAGE_SIZE),
        mask_mod=seen,
        seq_lengths=(query_len, num_pages * PAGE_SIZE),
    )


def take_turns(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Microseconds of each contender in each turn, after two turns to warm up."""
    micros: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-2, repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= 0:
                micros[name].append((time.perf_counter() - start) * 1e6)
    return micros


def median_ratio(slow: list[float], fast: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 2)


def copy_bandwidth(repeats: int) -> float:
    """Bytes read per microsecond by a copy of 256 MB."""
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    return source.nbytes / min(take_turns({"copy": lambda: target.copy_(source)}, repeats)["copy"])


def measure(num_seqs: int, seq_len: int, query_len: int, repeats: int, bandwidth: float) -> dict[str, object]:
    layout = make_layout(num_seqs, seq_len, query_len)
    contenders = {name: backend_step(name, layout, num_seqs * query_len) for name in ("sdpa", "reference")}
    contenders["flex"] = flex_step(layout, query_len)
    start = time.perf_counter()
    contenders["flex"]()
    compile_s = time.perf_counter() - start
    micros = take_turns(contenders, repeats)
    kv_bytes = 2 * num_seqs * seq_len * NUM_KV_HEADS * HEAD_DIM * 4
    return {
        "sequences": num_seqs,
        "seq_len": seq_len,
        "query_len": query_len,
        "micros": {name: round(statistics.median(times), 1) for name, times in micros.items()},
        "best_micros": {name: round(min(times), 1) for name, times in micros.items()},
        "limit_micros": round(kv_bytes / bandwidth, 1),
        "flex_over_sdpa": median_ratio(micros["flex"], micros["sdpa"]),
        "reference_over_sdpa": median_ratio(micros["reference"], micros["sdpa"]),
        "flex_compile_s": round(compile_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(options.repeats)
    print(f"copy reads {bandwidth / 1e3:.1f} GB/s with {options.threads} threads")
    rows = []
    with torch.no_grad():
        for case in CASES:
            rows.append(measure(*case, options.repeats, bandwidth))
            print(json.dumps(rows[-1]))
    result = {
        "date": datetime.date.today().isoformat(),
        "platform": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "torch": torch.__version__,
        "copy_read_gb_per_s": round(bandwidth / 1e3, 1),
        "cases": rows,
    }
    path = Path(__file__).parent / "results" / "cpu_attention.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
