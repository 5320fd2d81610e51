"""How many nodes compute metadata, in a graph with a copy for each layer and in the shared one.

    python benchmarks/metadata_nodes.py [--demo] [--output benchmarks/results/metadata_nodes.json]

Small models with random weights, with as many layers as the types have: what is counted depends on no width. With
`--demo` the demo model is counted, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import describe_machine
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodeploy as ad
from autodeploy.app.models import load_model, resolve_model

_WIDTHS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_HEADS: dict[str, Any] = {"head_dim": 16, "sliding_window": 8}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
# (type, layers, further sizes, layer types by turns)
_CASES: tuple[tuple[str, int, dict[str, Any], list[str]], ...] = (
    ("llama", 4, {}, []),
    ("llama", 32, {}, []),
    ("gemma3_text", 26, _HEADS, ["sliding_attention"] * 5 + ["full_attention"]),
    ("gpt_oss", 24, _HEADS | _EXPERTS, ["sliding_attention", "full_attention"]),
    ("lfm2", 16, {"block_auto_adjust_ff_dim": False}, ["conv", "conv", "full_attention"]),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="count the demo model, too")
    default = Path(__file__).parent / "results" / "metadata_nodes.json"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    rows = [_count(name, layers, _model(name, layers, sizes, cycle)) for name, layers, sizes, cycle in _CASES]
    if args.demo:
        model, _ = load_model(resolve_model("demo"), None)
        rows.append(_count("SmolLM2-135M", model.config.num_hidden_layers, model))
    args.output.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


def _model(name: str, layers: int, sizes: dict[str, Any], cycle: list[str]) -> PreTrainedModel:
    types = {"layer_types": [cycle[layer % len(cycle)] for layer in range(layers)]} if cycle else {}
    config = AutoConfig.for_model(name, num_hidden_layers=layers, **_WIDTHS, **sizes, **types)
    return AutoModelForCausalLM.from_config(config).eval()


def _count(name: str, layers: int, model: PreTrainedModel) -> dict[str, Any]:
    result = ad.apply(ad.trace(model))
    ledger = result.report.ledger
    row = {
        "model": name,
        "layers": layers,
        "attention_nodes": ledger.attention_nodes,
        "spans": [span.name for span in result.layout_spec.spans] if result.layout_spec else [],
        "nodes_naive": ledger.nodes_naive,
        "nodes_shared": ledger.nodes_shared,
        "ops_naive": ledger.ops_naive,
        "ops_shared": ledger.ops_shared,
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
