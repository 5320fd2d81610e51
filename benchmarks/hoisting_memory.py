"""What computing large masks once, at the start, does to peak memory: `backend="autodeploy"` beside Inductor.

    python benchmarks/hoisting_memory.py [--lengths 2048 4096] [--cases one two each]

Six layers of 8 heads add a bias [heads, length, length] to their scores and make it anew from positions: the same
bias in all ("one"), two by turns ("two"), or one of its own in each ("each"). To share the last kind helps nobody and
would keep six alive. `no bound` is our backend with the bound of `autodeploy.memory` taken away.

Peaks are those of one step over what was allocated before it, from the allocator's own record of each allocation
(torch.profiler) and from the process (resident set, high-water mark; Linux). All contenders compile at the same time,
each in its own process (workers.py).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.profiler import ProfilerActivity, profile
from workers import serve, started

from autodeploy.graph import memory
from autodeploy.viz.table import table as align

BASE, OURS, UNBOUNDED = "inductor", "autodeploy", "no bound"
NUM_BIASES = {"one": 1, "two": 2, "each": 6}
NUM_LAYERS, NUM_HEADS, WIDTH = 6, 8, 64
_RESET_HIGH_WATER_MARK = "5"  # written to /proc/self/clear_refs
_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--cases", nargs="+", choices=NUM_BIASES, default=list(NUM_BIASES))
    parser.add_argument("--attention", nargs="+", choices=["sdpa", "eager"], default=["sdpa", "eager"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "hoisting_memory.json")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work(*args.worker)
        return
    rows = [
        _row(case, attention, length) for length in args.lengths for attention in args.attention for case in args.cases
    ]
    print("\n".join(align(_table(rows), right=True)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": describe_machine(), "allowed_rise": memory.PEAK_SHARE, "rows": rows}
    args.output.write_text(json.dumps(results, indent=1) + "\n")


class Layer(nn.Module):
    """Attention with an ALiBi-like bias, and a gated map."""

    def __init__(self, attention: str, slope: float) -> None:
        super().__init__()
        self.attention, self.slope = attention, slope
        self.qkv, self.out, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        distance_TT = positions_T[None, :] - positions_T[:, None]
        slopes_H = self.slope * torch.arange(1, NUM_HEADS + 1)
        bias_HTT = torch.where(distance_TT <= 0, slopes_H[:, None, None] * distance_TT, -math.inf)
        q_HTD, k_HTD, v_HTD = self.qkv(x_TD).view(len(x_TD), 3, NUM_HEADS, -1).permute(1, 2, 0, 3)
        if self.attention == "sdpa":
            mixed_HTD = scaled_dot_product_attention(q_HTD[None], k_HTD[None], v_HTD[None], bias_HTT[None])[0]
        else:
            mixed_HTD = (q_HTD @ k_HTD.transpose(1, 2) * q_HTD.shape[-1] ** -0.5 + bias_HTT).softmax(-1) @ v_HTD
        mixed_TD = self.out(mixed_HTD.transpose(0, 1).flatten(1))
        return x_TD + mixed_TD * silu(self.gate(x_TD))


class Model(nn.Module):
    def __init__(self, case: str, attention: str) -> None:
        super().__init__()
        slopes = [2.0 ** -(layer % NUM_BIASES[case] + 2) for layer in range(NUM_LAYERS)]
        self.layers = nn.ModuleList(Layer(attention, slope) for slope in slopes)

    def forward(self, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = layer(x_TD, positions_T)
        return x_TD


def _work(case: str, attention: str, length: str, contender: str, result_file: str) -> None:
    torch.manual_seed(0)
    model = Model(case, attention).eval()
    x_TD, positions_T = torch.randn(int(length), WIDTH), torch.arange(int(length))
    for tensor in (x_TD, positions_T):
        torch._dynamo.mark_dynamic(tensor, 0)
    if contender == UNBOUNDED:
        memory.PEAK_SHARE = 1e9
    compiled = torch.compile(model, backend=BASE if contender == BASE else OURS, fullgraph=True)

    def step() -> Tensor:
        return compiled(x_TD, positions_T)

    def compile_step() -> Callable[[], Tensor]:
        step()
        return step

    with torch.no_grad():
        serve(
            result_file,
            compile_step,
            lambda _: {"allocated_mb": _allocated_mb(step), "resident_mb": _resident_mb(step)},
        )


def _allocated_mb(step: Callable[[], Tensor]) -> float:
    """The most bytes that torch has allocated at once during a step, over those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    profiler: Any = recorded.profiler  # torch's stubs lack the bytes of an event
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return round(peak / 1e6, 1)


def _resident_mb(step: Callable[[], Tensor]) -> float | None:
    """How far the resident set rose during a step; None where the system does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    before = _status_kb(status, "VmRSS")
    reset.write_text(_RESET_HIGH_WATER_MARK)
    step()
    return round((_status_kb(status, "VmHWM") - before) * 1024 / 1e6, 1)


def _status_kb(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def _row(case: str, attention: str, length: int) -> dict[str, Any]:
    print(f"{case}, {attention}, length {length}", file=sys.stderr, flush=True)
    names = (BASE, OURS, UNBOUNDED)
    with started(*((case, attention, length, name) for name in names)) as workers:
        for worker in workers:
            worker.ask("compile")
        figures = [worker.answer() for worker in workers]
        results = [worker.result() for worker in workers]
        steps = [round(worker.step_ms(_STEPS), 1) for worker in workers]
    row = {"case": case, "attention": attention, "length": length, "bias_mb": 4e-6 * NUM_HEADS * length**2}
    row |= {key: dict(zip(names, (f[key] for f in figures), strict=True)) for key in ("allocated_mb", "resident_mb")}
    row["step_ms"] = dict(zip(names, steps, strict=True))
    row["difference"] = float(max((results[0] - result).abs().max() for result in results))
    return row


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    names = (BASE, OURS, UNBOUNDED)
    header = ["biases, attention, length", "a bias, MB"]
    header += [f"{name}, {what}" for what in ("MB", "resident MB", "ms") for name in names]
    table = [header]
    for row in rows:
        cells = [f"{row['case']}, {row['attention']}, {row['length']}", f"{row['bias_mb']:.0f}"]
        cells += [str(row[key][name]) for key in ("allocated_mb", "resident_mb", "step_ms") for name in names]
        table.append(cells)
    return table


if __name__ == "__main__":
    main()
