"""All linear layers of a SmolLM2 step: torch's linear beside `autodeploy::linear`, by number of rows.

    python benchmarks/linear.py [--threads 2]

The two take turns; the fastest of 15 turns counts. The limit is reading the weights once, at the speed of summing them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe_machine
from torch.nn import functional as F

from autodeploy.ops.linear import linear
from autodeploy.viz.table import table as align

_LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linear.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weights = [torch.randn(shape) for shape in [*_LAYER * 30, (49152, 576)]]
    rows = [measure(weights, num_rows) for num_rows in (1, 2, 3, 4, 8, 16, 32)]
    (limit,) = fastest([lambda: [weight.sum() for weight in weights]])
    results = {"machine": describe_machine(), "threads": args.threads, "limit_ms": limit, "rows": rows}
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    table = [("rows", "torch ms", "ours ms", "torch / ours")]
    table += [(str(r["rows"]), f"{r['torch_ms']:.1f}", f"{r['ours_ms']:.1f}", f"{r['ratio']:.2f}") for r in rows]
    print("\n".join(align(table, right=True)), f"\nreading the weights once: {limit:.1f} ms")


def measure(weights: list[torch.Tensor], num_rows: int) -> dict[str, float]:
    inputs = {size: torch.randn(1, num_rows, size) for size in (576, 1536)}
    theirs, ours = fastest(
        [lambda f=f: [f(inputs[weight.shape[1]], weight) for weight in weights] for f in (F.linear, linear)]
    )
    return {"rows": num_rows, "torch_ms": theirs, "ours_ms": ours, "ratio": theirs / ours}


def fastest(contenders: list[Callable[[], object]], turns: int = 15) -> list[float]:
    """The shortest time of each, in milliseconds."""
    best = [float("inf")] * len(contenders)
    for _ in range(turns):
        for index, contender in enumerate(contenders):
            start = time.perf_counter()
            contender()
            best[index] = min(best[index], (time.perf_counter() - start) * 1e3)
    return best


if __name__ == "__main__":
    main()
