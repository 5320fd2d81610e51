"""Compiles a Triton kernel for a GPU that need not be there, and says what it takes of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one program can have.
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Resources:
    """Registers per thread, bytes per thread spilled to local memory, and bytes of shared memory per program."""

    registers: int
    spills: int
    shared_bytes: int


def compile_kernel(
    fn: Any, signature: dict[str, str], constexprs: dict[str, Any], target: str, **options: int
) -> Resources:
    """What `fn`, a function under triton.jit, takes when compiled for `target`, one of TARGETS.

    `signature` gives the type of each argument that is not in `constexprs`: "*bf16", "i32", "fp32", ...; pointers are
    taken as multiples of 16 bytes, as torch allocates them, and so are integers written "i32:16" of 16. An argument of
    neither is None; each `tl.constexpr` without a default must be given. `options` are num_warps, num_stages and the
    like.
    """
    wanted = {param.name for param in fn.params if param.is_constexpr and not param.has_default}
    assert wanted <= constexprs.keys(), f"{fn.__name__}: no value for {sorted(wanted - constexprs.keys())}"
    missing = [name for name in fn.arg_names if name not in signature]
    types = {name: signature.get(name, "constexpr").partition(":")[0] for name in fn.arg_names}
    divisible = [
        index
        for index, name in enumerate(fn.arg_names)
        if signature.get(name, "").startswith("*") or signature.get(name, "").endswith(":16")
    ]
    source = ASTSource(
        fn,
        types,
        constexprs={name: constexprs.get(name) for name in missing},
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    # Triton 3.9 warns where the fusion of multiplications and additions, its default, is not asked for.
    compiled = triton.compile(source, target=TARGETS[target], options={"enable_fp_fusion": True, **options})
    read = _read_amdgcn if TARGETS[target].backend == "hip" else _read_cubin
    registers, spills = read(compiled.asm)
    return Resources(registers, spills, compiled.metadata.shared)


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    def read(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"])
        assert found, name
        return int(found[1])

    return read("vgpr_count"), read("private_segment_fixed_size")
