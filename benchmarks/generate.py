"""Tokens per second of the demo model: compiled, uncompiled, and beside transformers' `generate`, in the same run.

    python benchmarks/generate.py [--sequences 1 8 32] [--output benchmarks/results/generate.json]

Every sequence has 128 prompt tokens and gets 64 new ones. transformers runs as it comes: sdpa attention, all sequences
in one left-padded batch (of one length here, so nothing is wasted on padding). The contenders take turns within each
repeat, so that a busy machine slows all alike; rates are medians, ratios the medians of each turn's ratio. The limit is
the time to read all weights once per step, at the bandwidth that a matrix times a vector of 256 MB reaches here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from transformers import GenerationConfig, PreTrainedModel

import autodeploy as ad
from autodeploy import options
from autodeploy.viz.table import table as align

PROMPT, NEW = 128, 64
Contender = Callable[[torch.Tensor, int], None]
_FIRST_TOKEN = """
import json, sys, time
start = time.perf_counter()
import autodeploy as ad
llm = ad.LLM("demo")
next(llm.stream("Hello"))
print(json.dumps({"seconds_in_llm": llm.timings.first_token, "seconds_with_imports": time.perf_counter() - start,
                  "is_warm": llm.timings.is_warm}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "generate.json")
    args = parser.parse_args()
    compiled = ad.LLM("demo", max_num_tokens=2048)
    eager = ad.LLM(compiled.model, compile=False, max_num_tokens=2048)
    contenders = {
        "compiled": _ours(compiled),
        "uncompiled": _ours(eager),
        "transformers": _transformers(compiled.model),
    }
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "transformers_attention": compiled.model.config._attn_implementation,
        "limit": _limit(compiled.model),
    }
    results["batches"] = [_measure(contenders, compiled, count, args.repeats) for count in args.sequences]
    results["first_token"] = _first_token()
    print("\n".join(align(_table(results), right=True)))
    print(json.dumps(results["limit"]), json.dumps(results["first_token"]), sep="\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


def _ours(llm: ad.LLM) -> Contender:
    def run(prompts: torch.Tensor, new_tokens: int) -> None:
        llm.generate(prompts.tolist(), ad.SamplingParams(max_tokens=new_tokens, ignore_eos=True))

    return run


def _transformers(model: PreTrainedModel) -> Contender:
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=2)  # without an end of sequence

    def run(prompts: torch.Tensor, new_tokens: int) -> None:
        mask = torch.ones_like(prompts)
        made = model.generate(prompts, attention_mask=mask, max_new_tokens=new_tokens)
        assert made.shape[1] == PROMPT + new_tokens

    return run


def _measure(contenders: dict[str, Contender], llm: ad.LLM, count: int, repeats: int) -> dict[str, Any]:
    """Seconds for prompts and answers, and for one token only, of each contender in each repeat."""
    prompts = torch.randint(10, 40000, (count, PROMPT), generator=torch.Generator().manual_seed(count))
    whole: dict[str, list[float]] = {name: [] for name in contenders}
    first: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        _seconds(run, prompts, 2)
    host, steps = 0.0, 0
    for repeat in range(repeats):
        print(f"{count} sequences, repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        for name, run in contenders.items():
            first[name].append(_seconds(run, prompts, 1))
            host_before, steps_before = llm.stats.host_seconds, llm.stats.num_steps
            whole[name].append(_seconds(run, prompts, NEW))
            host += llm.stats.host_seconds - host_before
            steps += llm.stats.num_steps - steps_before
    rates = {name: count * NEW / statistics.median(seconds) for name, seconds in whole.items()}
    steps_ms = {
        name: 1e3 * statistics.median(a - b for a, b in zip(whole[name], first[name], strict=True)) / (NEW - 1)
        for name in contenders
    }
    return {
        "sequences": count,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "prompts_ms": {name: round(1e3 * statistics.median(seconds), 1) for name, seconds in first.items()},
        "decode_step_ms": {name: round(ms, 2) for name, ms in steps_ms.items()},
        "over_transformers": {
            name: round(
                statistics.median(
                    theirs / ours for theirs, ours in zip(whole["transformers"], whole[name], strict=True)
                ),
                2,
            )
            for name in contenders
        },
        "host_micros_per_step": round(1e6 * host / steps, 1),
    }


def _seconds(run: Contender, prompts: torch.Tensor, new_tokens: int) -> float:
    start = time.perf_counter()
    run(prompts, new_tokens)
    return time.perf_counter() - start


def _limit(model: PreTrainedModel) -> dict[str, float]:
    """How fast a decode step can be if it does nothing but read the weights."""
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    matrix, vector = torch.ones(8192, 8192), torch.ones(8192)
    matrix @ vector
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        matrix @ vector
        seconds.append(time.perf_counter() - start)
    bandwidth = matrix.nbytes / statistics.median(seconds)
    return {
        "weight_megabytes": round(weight_bytes / 1e6, 1),
        "gigabytes_per_second": round(bandwidth / 1e9, 1),
        "decode_step_ms": round(1e3 * weight_bytes / bandwidth, 2),
    }


def _first_token() -> dict[str, Any]:
    """Seconds to the first piece of text in a new process: with nothing cached but the model, and a second time."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(options.from_environment().cache_dir / "models")
        environment = os.environ | {"AUTODEPLOY_CACHE": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch"}
        measured = {}
        for name in ("cold", "warm"):
            print(f"time to first token, {name}", file=sys.stderr, flush=True)
            result = subprocess.run(
                [sys.executable, "-c", _FIRST_TOKEN], env=environment, stdout=subprocess.PIPE, check=True
            )
            measured[name] = json.loads(result.stdout.splitlines()[-1])
    return measured


def _table(results: dict[str, Any]) -> list[list[str]]:
    rows = [["sequences", "", "tokens/s", "x transformers", "prompts, ms", "decode step, ms", "host, us/step"]]
    for batch in results["batches"]:
        rows += [
            [
                str(batch["sequences"]),
                name,
                f"{rate:.1f}",
                f"{batch['over_transformers'][name]:.2f}",
                f"{batch['prompts_ms'][name]:.0f}",
                f"{batch['decode_step_ms'][name]:.1f}",
                f"{batch['host_micros_per_step']:.0f}" if name == "compiled" else "",
            ]
            for name, rate in batch["tokens_per_second"].items()
        ]
    return rows


if __name__ == "__main__":
    main()
