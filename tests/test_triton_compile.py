"""Every Triton kernel compiles for every GPU that it is meant for, and fits there."""

from __future__ import annotations

import pytest
from triton_cases import CASES, Case
from triton_compile import SHARED_BYTES, compile_kernel

COMPILED = [pytest.param(case, target, id=f"{case.name}-{target}") for case in CASES for target in case.targets]


@pytest.mark.parametrize(("case", "target"), COMPILED)
def test_compiles_and_fits(case: Case, target: str) -> None:
    taken = compile_kernel(case.fn, case.signature, case.constexprs, target, **case.options)
    assert taken.shared_bytes <= SHARED_BYTES[target]
    # Spills on the other GPUs are recorded by benchmarks/triton_compile.py; block sizes are chosen for this one.
    # Triton 3.7 spills two registers of one of them, older and newer versions none.
    assert target != "sm_90" or taken.spills <= 8
