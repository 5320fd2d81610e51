"""What `share_metadata` saves our own pipeline: its paged graphs with a copy of the metadata per layer, and without.

    python benchmarks/naive_metadata.py [--types llama gemma3_text] [--layers 4 32]

Tiny models with random weights. Both graphs are lowered in the same way, by `autodeploy.lowering.lower`; the naive one
is the default pipeline without `share_metadata` (and so without `lower_fields`, which works inside its node): Inductor
writes each layer's fields out. How both are compiled and timed is said in workers.py. The step is a decode step of 8
sequences, each with 100 tokens in its cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from torch import Tensor
from workers import compare, serve, started

import autodeploy as ad
from autodeploy.compiler.apply import Result, resolve_passes
from autodeploy.inductor.lower import lower
from autodeploy.metadata.nest import nest_sequences
from autodeploy.runtime.caches import allocate_caches
from autodeploy.viz.table import table as align

NAIVE, SHARED = "naive", "shared"
_SHARING = ("share_metadata", "lower_fields")
NUM_SEQS, CONTEXT_LEN = 8, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["llama", "gemma3_text"])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "naive_metadata.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work(*args.worker)
        return
    rows: list[dict[str, Any]] = []
    for layers in args.layers:
        for model_type in args.types:
            print(f"{model_type} with {layers} layers", file=sys.stderr, flush=True)
            with started((model_type, layers, NAIVE), (model_type, layers, SHARED)) as workers:
                rows.append({"model_type": model_type, "layers": layers} | compare((NAIVE, SHARED), *workers))
    print("\n".join(align(_table(rows), right=True)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


def _work(model_type: str, layers: str, variant: str, result_file: str) -> None:
    from zoo import tiny

    model = tiny(model_type, int(layers))
    passes = [step for step in resolve_passes(None) if variant == SHARED or step.name not in _SHARING]
    result = ad.apply(ad.trace(model), passes=passes)
    assert result.layout_spec
    spec, caches = result.layout_spec, result.cache_specs

    def compile_step() -> Callable[[], Tensor]:
        return _step(lower(result.module, model, spec, caches, result.report).bind(model), result)

    with torch.no_grad():
        serve(result_file, compile_step, lambda _: {"metadata_ops": result.report.passes[-1].after.metadata_ops})


def _step(run: Callable[..., Tensor], result: Result) -> Callable[[], Tensor]:
    spec = result.layout_spec
    assert spec
    pages = -(-(CONTEXT_LEN + 1) // spec.page_size)
    num_pages = [1 + NUM_SEQS * pages] * spec.num_groups
    table = 1 + np.arange(NUM_SEQS * pages).reshape(NUM_SEQS, pages)
    nested = nest_sequences(
        5 + np.arange(NUM_SEQS),
        np.ones(NUM_SEQS, dtype=np.int32),
        np.full(NUM_SEQS, CONTEXT_LEN),
        np.broadcast_to(table, (spec.num_groups, NUM_SEQS, pages)),
        1 + np.arange(NUM_SEQS),
        spec,
        num_pages=num_pages,
        num_state_slots=NUM_SEQS + 1,
    )
    caches = allocate_caches(result.cache_specs, spec.page_size, num_pages, NUM_SEQS, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for cache in caches:
        cache.normal_(generator=generator)
    return lambda: run(nested.input_ids, nested.layout, *caches)


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["naive -> shared", "metadata ops", "kernels", "compile, s", "compile, CPU s", "step, ms", "step ratio"]]
    for row in rows:
        kernels = {name: counts["generated"] for name, counts in row["kernels"].items()}
        low, middle, high = row["step_ratio"]
        table.append(
            [
                f"{row['model_type']} {row['layers']}",
                _pair(row["metadata_ops"], "d"),
                f"{_pair(kernels, 'd')} ({kernels[NAIVE] / kernels[SHARED]:.2f} x)",
                _saved(row["compile_seconds"]),
                _saved(row["compile_processor_seconds"]),
                _pair(row["step_ms"], ".2f"),
                f"{middle:.2f} [{low:.2f}, {high:.2f}]",
            ]
        )
    return table


def _saved(seconds: dict[str, float]) -> str:
    return f"{_pair(seconds, '.1f')} (-{1 - seconds[SHARED] / seconds[NAIVE]:.0%})"


def _pair(values: dict[str, float], form: str) -> str:
    return f"{values[NAIVE]:{form}} -> {values[SHARED]:{form}}"


if __name__ == "__main__":
    main()
