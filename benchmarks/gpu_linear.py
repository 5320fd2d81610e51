"""Linear layers of Llama-3-8B's decode step on a GPU: cuBLAS beside our kernel, over the ways to cut its launch.

    python benchmarks/gpu_linear.py [--output gpu_linear.json]

Each time is that of one layer, or of layers that share their input, among many in one CUDA graph; weights take turns,
so that none is found in the L2 cache. `choose_config` in `autodeploy/kernels/triton_linear.py` is set by this table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor
from torch.nn import functional as F

from autodeploy.kernels.triton_linear import Config, launch
from autodeploy.viz.table import table as align

# Name: output features of each layer, input features.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "k": ((1024,), 4096),
    "o": ((4096,), 4096),
    "q, k, v": ((4096, 1024, 1024), 4096),
    "gate, up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
    "lm_head": ((128256,), 4096),
}
# How often a step runs each; k runs with q and v.
COUNTS = {"q, k, v": 32, "o": 32, "gate, up": 32, "down": 32, "lm_head": 1}
ROWS = (1, 2, 8, 16, 64)
_FEW = (
    Config(16, 128, 4, 8),
    Config(16, 256, 2, 6),
    Config(16, 256, 4, 4),
    Config(16, 256, 4, 6),
    Config(16, 512, 4, 4),
    Config(32, 128, 4, 6),
    Config(32, 256, 4, 4),
    Config(32, 256, 4, 6),
    Config(32, 256, 8, 6),
    Config(64, 128, 4, 6),
    Config(64, 256, 4, 4),
)
_MANY = (Config(32, 128, 4, 6), Config(64, 128, 4, 6), Config(64, 128, 8, 4), Config(128, 128, 4, 4))
_ROTATED_BYTES = 256 << 20
_GRAPH_BYTES = 3 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_linear.json")
    args = parser.parse_args()
    results = measure_linears()
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def measure_linears() -> dict[str, Any]:
    """All shapes, rows and ways to cut; about a minute, half of it compilation in other processes."""
    with ProcessPoolExecutor(10, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*_variants(), strict=True)))
    rows = [row for name in SHAPES for row in _measure_shape(name)]
    machine = describe_machine() | {"gpu": torch.cuda.get_device_name()}
    return {"machine": machine, "copy_tb_per_s": _copy_bandwidth(), "rows": rows}


def print_table(results: dict[str, Any]) -> None:
    table = [("layers", "rows", "cuBLAS us", "TB/s", "ours us", "TB/s", "chosen us", "best three")]
    for row in results["rows"]:
        best = sorted(row["ours_us"].items(), key=lambda item: item[1])[:3]
        per_us = row["bytes"] / 1e6
        cublas, ours = row["cublas_us"], best[0][1]
        three = ", ".join(f"{config} {us:.1f}" for config, us in best)
        times = (f"{cublas:.1f}", f"{per_us / cublas:.2f}", f"{ours:.1f}", f"{per_us / ours:.2f}")
        table.append((row["layers"], str(row["rows"]), *times, f"{row['chosen_us']:.1f}", three))
    print("\n".join(align(table, right=True)))
    print(f"copying memory: {results['copy_tb_per_s']:.2f} TB/s")
    for num_rows in ROWS:
        print_step([row for row in results["rows"] if row["rows"] == num_rows], results["copy_tb_per_s"])


def print_step(rows: list[dict[str, Any]], tb_per_s: float) -> None:
    """All linear layers of a step, for the rows of the table of one number of rows."""

    def ms(us: Callable[[dict[str, Any]], float]) -> float:
        return sum(COUNTS.get(row["layers"], 0) * us(row) for row in rows) / 1e3

    times = {
        "cuBLAS": ms(lambda row: row["cublas_us"]),
        "chosen": ms(lambda row: row["chosen_us"]),
        "best": ms(lambda row: min(row["ours_us"].values())),
        "reading the weights": ms(lambda row: row["bytes"] / tb_per_s / 1e6),
    }
    print(f"a step of {rows[0]['rows']} rows:", ", ".join(f"{name} {value:.2f} ms" for name, value in times.items()))


def _configs(num_rows: int) -> tuple[Config, ...]:
    return _MANY if num_rows > 16 else _FEW


def _variants() -> Iterator[tuple[str, int, Config]]:
    """(name, rows, config) of everything that is compiled: shapes of as many layers and inputs are one kernel."""
    kernels = {(len(sizes), input_size): name for name, (sizes, input_size) in SHAPES.items()}
    for name in kernels.values():
        for num_rows in (8, 16, 64):
            for config in _configs(num_rows):
                yield name, num_rows, config


def _compile(name: str, num_rows: int, config: Config) -> None:
    """Leaves the kernel in Triton's cache, where this process finds it."""
    sizes, input_size = SHAPES[name]
    x = torch.randn(num_rows, input_size, dtype=torch.bfloat16, device="cuda")
    weights = [x.new_empty(16, input_size) for _ in sizes]
    launch(x, weights, config=config)
    torch.cuda.synchronize()


def _measure_shape(name: str) -> list[dict[str, Any]]:
    sizes, input_size = SHAPES[name]
    num_sets = max(2, -(-_ROTATED_BYTES // (2 * sum(sizes) * input_size)))
    sets = [
        [torch.randn(size, input_size, dtype=torch.bfloat16, device="cuda") * input_size**-0.5 for size in sizes]
        for _ in range(num_sets)
    ]
    return [{"layers": name, **_measure(num_rows, sets)} for num_rows in ROWS]


def _measure(num_rows: int, sets: list[list[Tensor]]) -> dict[str, Any]:
    x = torch.randn(num_rows, sets[0][0].shape[1], dtype=torch.bfloat16, device="cuda")
    configs = _configs(num_rows)
    _check(x, sets[0], configs)
    ours = {config: _time(lambda ws, c=config: launch(x, ws, config=c), sets) for config in configs}
    return {
        "rows": num_rows,
        "bytes": sum(weight.nbytes for weight in sets[0]),
        "cublas_us": _time(lambda ws: [F.linear(x, weight) for weight in ws], sets),
        "chosen_us": _time(lambda ws: launch(x, ws), sets),
        "ours_us": {"/".join(map(str, config)): us for config, us in ours.items()},
    }


def _check(x: Tensor, weights: list[Tensor], configs: tuple[Config, ...]) -> None:
    """Every way to cut gives the right numbers."""
    expected = [F.linear(x.float(), weight.float()) for weight in weights]
    for config in configs:
        for out, right in zip(launch(x, weights, config=config), expected, strict=True):
            torch.testing.assert_close(out.float(), right, atol=1e-3, rtol=2**-7)


def _time(function: Callable[[list[Tensor]], object], sets: list[list[Tensor]]) -> float:
    """Microseconds of one call among those of a CUDA graph that reads _GRAPH_BYTES; the median of 5 replays."""
    calls = max(8, _GRAPH_BYTES // sum(weight.nbytes for weight in sets[0]))
    for _ in range(2):
        function(sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weights in islice(cycle(sets), calls):
            function(weights)
    graph.replay()
    return median(_replay(graph) for _ in range(5)) * 1e3 / calls


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _copy_bandwidth() -> float:
    """Bytes read and written per picosecond by a copy of 2 GiB."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").fill_(1)
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 20 * source.nbytes / start.elapsed_time(end) / 1e9


if __name__ == "__main__":
    main()
