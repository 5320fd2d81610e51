"""What every Triton kernel takes of each GPU that we compile for: registers, spills, shared memory. Needs no GPU.

    python benchmarks/triton_compile.py [--only NAME]

Writes results/triton_compile.json next to this file, unless `--only` compiles some of the cases.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import triton
from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from triton_cases import CASES
from triton_compile import compile_kernel

RESULTS = Path(__file__).parent / "results" / "triton_compile.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="compile the cases whose name contains this")
    only = parser.parse_args().only
    rows = []
    print(f"{'kernel':40} {'target':8} registers  spilled bytes  shared bytes")
    for name, fn, signature, constexprs, options, targets in CASES:
        if only not in name:
            continue
        for target in targets:
            taken = compile_kernel(fn, signature, constexprs, target, **options)
            rows.append({"kernel": name, "target": target, **options, **asdict(taken)})
            print(f"{name:40} {target:8} {taken.registers:9}  {taken.spills:13}  {taken.shared_bytes:12}", flush=True)
    if not only:
        machine = describe_machine() | {"triton": triton.__version__}
        RESULTS.write_text(json.dumps({"machine": machine, "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
