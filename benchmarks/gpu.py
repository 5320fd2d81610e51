"""What this machine's GPU does with our kernels and with a whole model, beside their peers and the limits.

    python benchmarks/gpu.py [SECTION ...] [--output benchmarks/results/<device>.json]

Sections, in this order: limits (copy bandwidth, matrix product), prepare (all metadata of a step), attention (the
decode kernel alone), host (the host's work for a decode step), decode and prefill (a model of the shape of
Llama-3-8B with random weights, bfloat16), profile (where the time of a step goes), transformers (its decode step
beside ours). Each is written to the file as it ends, so that a call cut short keeps what it measured. All of them take
some five minutes on an H100.

Times are medians over repeated runs, of CUDA graphs where a step is launch-bound; weights and caches are larger than
the L2 cache and are read in turn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_model
import gpu_parts
import torch
from machine import describe_machine

SECTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "limits": gpu_parts.limits,
    "prepare": gpu_parts.prepare,
    "attention": gpu_parts.attention,
    "host": gpu_parts.host,
    "decode": gpu_model.decode,
    "prefill": gpu_model.prefill,
    "profile": gpu_model.profile,
    "transformers": gpu_model.transformers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all if none is named"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"unknown sections {unknown}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    device = torch.cuda.get_device_name()
    default = Path(__file__).parent / "results" / f"{device.replace(' ', '_').lower()}.json"
    path = args.output or default
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {"machine": describe_machine() | {"device": device}}
    for name, measure in SECTIONS.items():
        if args.sections and name not in args.sections:
            continue
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        results[name] = measure(results)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
