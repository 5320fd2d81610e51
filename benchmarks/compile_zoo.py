"""What `backend="autodeploy"` does to raw graphs of transformers' models, beside `backend="inductor"`.

    python benchmarks/compile_zoo.py [--types gemma2 llama] [--layers 4 32]

Tiny models with random weights, float32, under no_grad, fullgraph, a batch of 2 with a padding mask whose length is
dynamic (64 when timed). How both are compiled and timed is said in workers.py. Where outputs differ, or autodeploy
looks slower, Inductor is compiled once more: how far two runs of the same lie apart is what to compare with.

Layout-only nodes are those that read no weight, in the graphs that Inductor lowers after all passes. They are counted
by a structural hash that shares no code with the passes. A row that the output file has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from measure import Watched, count_layout_only
from torch import Tensor, fx
from workers import WorkerError, compare, serve, started

from autodeploy.graph.meta import DESCRIPTION

# Those that build masks, rotary tables or ALiBi per layer or per kind of layer come first.
_NAMES = """
    gemma2 gemma3_text gpt_oss cohere2 codegen llama4_text gemma4_text inkling_text mellum bloom mpt opt gpt2 llama
    qwen3 mistral phi3 mixtral olmo2 glm4
"""
TYPES = tuple(_NAMES.split())
EAGER = ("gemma2", "gpt_oss", "codegen", "bloom", "mpt")  # transformers has no sdpa for these
BASE, OURS = "inductor", "autodeploy"
BATCH, LENGTH, OTHER_LENGTH = 2, 64, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--backend", default=OURS, help=f"instead of {OURS}; {BASE} shows the noise of the comparison")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compile_zoo.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work(*args.worker)
        return
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    done = {(row["model_type"], row["layers"]) for row in rows}
    cases = [(model_type, layers) for layers in args.layers for model_type in args.types]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases, 1):
        if case in done:
            continue
        print(f"{number} of {len(cases)}: {case[0]} with {case[1]} layers", file=sys.stderr, flush=True)
        rows.append(_row(*case, args.backend))
        args.output.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(_markdown(rows))


def _row(model_type: str, layers: int, backend: str) -> dict[str, Any]:
    """Everything measured of one model, as plain data; `error` instead where one of the backends fails."""
    machine = describe_machine()
    row = {"model_type": model_type, "layers": layers, "attention": _attention(model_type)}
    row |= {key: machine[key] for key in ("date", "load_average")}
    try:
        return row | _compare(model_type, layers, backend)
    except WorkerError as error:
        print(error, file=sys.stderr)
        return row | {"error": str(error).splitlines()[-1]}


def _compare(model_type: str, layers: int, backend: str) -> dict[str, Any]:
    base, ours = (model_type, layers, BASE), (model_type, layers, backend)
    with started(base, ours) as workers:
        found = compare((BASE, OURS), *workers)
    is_slower = found["step_ratio"][1] > found["step_noise"][2]
    if not found["difference"] and not is_slower:
        return found
    with started(base, base) as workers:
        again = compare(("first", "second"), *workers)
    return found | {"inductor_twice": {key: again[key] for key in ("difference", "step_ratio", "step_noise")}}


def _attention(model_type: str) -> str:
    return "eager" if model_type in EAGER else "sdpa"


def _work(model_type: str, layers: str, backend: str, result_file: str) -> None:
    from zoo import VOCAB_SIZE, tiny

    model = tiny(model_type, int(layers), _attention(model_type))
    ids = torch.randint(5, VOCAB_SIZE - 5, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    inputs = {
        length: {"input_ids": ids[:, :length].clone(), "attention_mask": mask[:, :length].clone()}
        for length in (LENGTH, OTHER_LENGTH)
    }
    for tensor in inputs[LENGTH].values():
        torch._dynamo.mark_dynamic(tensor, 1)
    weights: set[int] = set()
    compiled = torch.compile(model, backend=_noting_weights(backend, weights), fullgraph=True)

    def step(length: int = LENGTH) -> Tensor:
        return compiled(**inputs[length], use_cache=False).logits

    def compile_step() -> Any:
        step()
        return step

    def describe(watched: Watched) -> dict[str, Any]:
        step(OTHER_LENGTH)
        return _describe(watched.graphs[-1].graph, weights)

    with torch.no_grad():
        serve(result_file, compile_step, describe)


def _noting_weights(backend: str, weights: set[int]) -> Any:
    """The backend of that name, which first notes the places of weights among the graph's inputs."""

    def compile_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        weights.update(place for place, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter))
        return torch._dynamo.lookup_backend(backend)(gm, example_inputs)

    return compile_graph


def _describe(graph: fx.Graph, weights: set[int]) -> dict[str, Any]:
    places = [DESCRIPTION.of(node).idx for node in graph.find_nodes(op="placeholder")]
    assert places == list(range(len(places))), "AOTAutograd has changed the order of the inputs"
    layout_only, unique = count_layout_only(graph, weights)
    return {
        "compilations": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "nodes": len(graph.nodes),
        "layout_only": layout_only,
        "layout_only_unique": unique,
    }


def _markdown(rows: list[dict[str, Any]]) -> str:
    header = ["model", "layers", "layout-only nodes", "left twice", "kernels", "compile, CPU s", "step, ms"]
    header += ["step ratio", "noise", "difference"]
    cells = [_cells(row) for row in rows if "error" not in row]
    table = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *cells]]
    failed = [
        f"{row['model_type']} with {row['layers']} layers failed: {row['error']}" for row in rows if "error" in row
    ]
    return "\n".join(table + failed)


def _cells(row: dict[str, Any]) -> list[str]:
    """Inductor -> autodeploy, ratios as median [lower quartile, upper quartile]."""
    generated = {name: kernels["generated"] for name, kernels in row["kernels"].items()}
    twice = row.get("inductor_twice")
    noise = f"{_spread(row['step_noise'])}" + (f", twice {_spread(twice['step_ratio'])}" if twice else "")
    difference = f"{row['difference']:.1g}" + (f", twice {twice['difference']:.1g}" if twice else "")
    return [
        row["model_type"],
        str(row["layers"]),
        _pair(row["layout_only"], "d"),
        str(row["layout_only"][OURS] - row["layout_only_unique"][OURS]),
        _pair(generated, "d"),
        _pair(row["compile_processor_seconds"], ".1f"),
        _pair(row["step_ms"], ".2f"),
        _spread(row["step_ratio"]),
        noise,
        difference,
    ]


def _pair(values: dict[str, float], form: str) -> str:
    return f"{values[BASE]:{form}} -> {values[OURS]:{form}}"


def _spread(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
