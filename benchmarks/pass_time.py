"""What the passes cost beside tracing, and what metadata costs before and after sharing, as layers are added.

    python benchmarks/pass_time.py [--layers 4 10 30 100] [--output benchmarks/results/pass_time.json]

Random models of narrow width: time depends on the number of nodes, not on their sizes. `prepare nodes` must not grow
with the layers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from machine import describe_machine
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodeploy as ad
from autodeploy.graph.edit import PREPARE
from autodeploy.viz.table import table as align

_WIDTH: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_SIX_TO_ONE = ["sliding_attention"] * 5 + ["full_attention"]  # gemma 3's pattern
_REPEATS = 3
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 10, 30, 100], help="of the llama models")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pass_time.json")
    args = parser.parse_args()
    _measure("llama", 2)  # the first trace and the first run of each pass import what they need
    cases = [("llama", layers) for layers in args.layers] + [("gemma3_text", 4), ("gemma3_text", 40)]
    measured = [_measure(*case) for case in cases]
    print("\n".join(align(_table(measured), right=True)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"machine": describe_machine(), "models": measured}, indent=1) + "\n")


def _model(model_type: str, layers: int) -> PreTrainedModel:
    sizes = _WIDTH | {"num_hidden_layers": layers}
    if model_type == "gemma3_text":
        sizes |= {"sliding_window": 8, "layer_types": [_SIX_TO_ONE[layer % 6] for layer in range(layers)]}
        # Four layers are to have both types as well.
        sizes["layer_types"][-1] = "full_attention"
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()


def _measure(model_type: str, layers: int) -> dict[str, Any]:
    """Milliseconds of one trace, medians of several runs of the passes on it, and the counts of nodes."""
    print(f"{model_type} with {layers} layers", file=sys.stderr, flush=True)
    model = _model(model_type, layers)
    gc.collect()
    gm, trace_processor = _timed(lambda: ad.trace(model))
    results, processor = zip(*(_timed(lambda: ad.apply(gm)) for _ in range(_REPEATS)), strict=True)
    runs = [{record.name: record.seconds for record in result.report.passes} for result in results]
    result, ledger = results[-1], results[-1].report.ledger
    each = {name: 1e3 * statistics.median(run[name] for run in runs) for name in runs[0]}
    trace = 1e3 * result.report.trace_seconds
    passes = 1e3 * statistics.median(sum(run.values()) for run in runs)
    return {
        "model": model_type,
        "layers": layers,
        "trace_ms": round(trace, 1),
        "passes_ms": round(passes, 1),
        "passes_over_trace": round(passes / trace, 4),
        # What others on the machine do lengthens the times above, and not these.
        "trace_processor_ms": round(trace_processor, 1),
        "passes_processor_ms": round(statistics.median(processor), 1),
        "each_pass_ms": {name: round(value, 2) for name, value in each.items()},
        "nodes": len(result.module.graph.nodes),
        "prepare_nodes": len(getattr(result.module, PREPARE).graph.nodes),
        "metadata_nodes_naive": ledger.nodes_naive,
        "metadata_nodes_shared": ledger.nodes_shared,
        "metadata_ops_naive": ledger.ops_naive,
        "metadata_ops_shared": ledger.ops_shared,
    }


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """What `call` returns, and the milliseconds of processor time that it took."""
    start = time.process_time()
    result = call()
    return result, 1e3 * (time.process_time() - start)


def _table(measured: list[dict[str, Any]]) -> list[list[str]]:
    names = list(measured[0]["each_pass_ms"])
    keys = ("nodes", "prepare_nodes", "metadata_nodes_naive", "metadata_nodes_shared", "metadata_ops_naive")
    lines = [("model", [f"{m['model']} {m['layers']}" for m in measured])]
    lines += [
        (f"{key.removesuffix('_ms')}, ms", [f"{m[key]:.0f}" for m in measured]) for key in ("trace_ms", "passes_ms")
    ]
    lines += [("passes / trace", [f"{m['passes_over_trace']:.1%}" for m in measured])]
    lines += [("passes per node, us", [f"{1e3 * m['passes_ms'] / m['nodes']:.0f}" for m in measured])]
    lines += [(f"  {name}, ms", [f"{m['each_pass_ms'][name]:.1f}" for m in measured]) for name in names]
    lines += [(key.replace("_", " "), [str(m[key]) for m in measured]) for key in (*keys, "metadata_ops_shared")]
    return [[name, *cells] for name, cells in lines]


if __name__ == "__main__":
    main()
