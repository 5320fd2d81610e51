"""How many nodes compute metadata, in a graph with a copy for each layer and in the shared one.

    python benchmarks/metadata_nodes.py [--demo] [--output benchmarks/results/metadata_nodes.json]

Small models with random weights, with as many layers as the types have: what is counted depends on no width. With
`--demo` the demo model is counted, too. Fields are counted as each layer computes its own, as an
engine does that prepares them for each kind and group of layers, and as one node computes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import describe_machine
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodeploy as ad
from autodeploy.app.coverage import coverage
from autodeploy.app.models import load_model, resolve_model
from autodeploy.app.tiny import tiny_model
from autodeploy.graph.edit import PREPARE
from autodeploy.metadata.field import is_field
from passes import default

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
# Of several kinds in one model, in the order of the published models.
_LINEAR = ["linear_attention"] * 3 + ["full_attention"]
_HYBRIDS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("qwen3_next", 48, {"layer_types": _LINEAR * 12}),
    ("bamba", 32, {"attn_layer_indices": [9, 18, 27]}),
    ("deepseek_v3", 61, {}),
    ("deepseek_v32", 61, {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="count the demo model, too")
    default = Path(__file__).parent / "results" / "metadata_nodes.json"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    rows = [_count(name, layers, _model(name, layers, sizes, cycle)) for name, layers, sizes, cycle in _CASES]
    rows += [
        _count(name, layers, tiny_model(name, overrides=sizes, num_layers=layers)) for name, layers, sizes in _HYBRIDS
    ]
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
    } | _fields(model)
    print(row, flush=True)
    return row


def _fields(model: PreTrainedModel) -> dict[str, int]:
    found = coverage(model)
    per_kind = {(layer.kind, layer.span, layer.backend): len(layer.fields) for layer in found.layers}
    steps = default()
    names = [step.name for step in steps]
    shared = ad.apply(ad.trace(model), passes=steps[: names.index("share_metadata") + 1]).module
    prepare: Any = getattr(shared, PREPARE)
    return {
        "fields_naive": sum(len(layer.fields) for layer in found.layers),
        "fields_per_kind_and_group": sum(per_kind.values()),
        "fields_shared": sum(is_field(node.target) for node in prepare.graph.nodes),
    }


if __name__ == "__main__":
    main()
