"""Host work of a decode step: schedule, pack, copy, fetch, bookkeeping, with a model that computes nothing.

    python benchmarks/host_work.py [--sequences 1 8 64 256] [--device cpu] [--before REVISION]
        [--output benchmarks/results/host_work.json]

The step returns logits of 2 tokens that were made before. "host" is what the engine counts as the host's work, without
the step, the choice of tokens and waiting for them; "whole" is all of `Engine.step`. Medians of single steps. Two KV
groups, one of them a sliding window of 64 tokens; prompts of 17 to 80 tokens, so that in every step some sequences
begin a page and some leave one behind. With `--before` the same is measured for that revision of the repository, in
processes of its own, and both take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from autodeploy.metadata.layout import LayoutSpec
from autodeploy.metadata.span import Full, Window
from autodeploy.ops.cache import Paged
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.requests import SamplingParams
from autodeploy.viz.table import table as align

ROOT = Path(__file__).parents[1]
PAGE_SIZE, WINDOW, MAX_MODEL_LEN = 16, 64, 8192
WARM_UP, STEPS, REPEATS = 40, 400, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--before", metavar="REVISION")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "host_work.json")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(_micros(args.measure, args.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        roots = {"now": ROOT}
        if args.before:
            archive = subprocess.run(["git", "archive", args.before], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            roots["before"] = Path(folder)
        batches = [{"sequences": count, **_turns(roots, count, args.device)} for count in args.sequences]
    print("\n".join(align(_table(batches), right=True)))
    from machine import describe_machine

    results = {
        "machine": describe_machine(),
        "device": str(args.device),
        "before": args.before,
        "micros_per_decode_step": batches,
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n")


def _turns(roots: dict[str, Path], count: int, device: torch.device) -> dict[str, float]:
    """Medians over the repeats of each revision's microseconds per step, host and whole."""
    micros: dict[str, list[float]] = {f"{name}, {part}": [] for name in roots for part in ("host", "whole")}
    for _ in range(REPEATS):
        for name, root in roots.items():
            command = [sys.executable, __file__, "--measure", str(count), "--device", str(device)]
            environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            for part, each in json.loads(done.stdout).items():
                micros[f"{name}, {part}"].append(each)
    return {name: round(statistics.median(each), 1) for name, each in micros.items()}


def _micros(count: int, device: torch.device) -> dict[str, float]:
    """Median microseconds of a decode step of `count` sequences."""
    logits = torch.zeros(count + 8, 2, device=device)
    engine = Engine(
        lambda input_ids, layout, *caches: logits[: layout.shape[0]],
        (
            Paged("full", (1,), torch.int8),
            Paged("window", (1,), torch.int8, group=1),
        ),
        LayoutSpec(PAGE_SIZE, (Full(), Window(WINDOW))),
        device=device,
        num_pages=(count * MAX_MODEL_LEN // PAGE_SIZE + 1, count * MAX_MODEL_LEN // PAGE_SIZE + 1),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=count,
        max_num_tokens=max(2048, count),
        eos_token_ids=[1],
    )
    for index in range(count):
        engine.add([1] * (17 + index % 64), SamplingParams(max_tokens=2000))
    for _ in range(WARM_UP):
        engine.step()
    whole, host = [], []
    for _ in range(STEPS):
        start, counted = perf_counter(), engine.stats.host_seconds
        engine.step()
        whole.append(perf_counter() - start)
        host.append(engine.stats.host_seconds - counted)
    return {"host": statistics.median(host) * 1e6, "whole": statistics.median(whole) * 1e6}


def _table(batches: list[dict[str, Any]]) -> list[list[str]]:
    names = [name for name in batches[0] if name != "sequences"]
    rows = [["sequences", *(f"{name}, us" for name in names)]]
    return rows + [[str(batch["sequences"]), *(f"{batch[name]:.1f}" for name in names)] for batch in batches]


if __name__ == "__main__":
    main()
