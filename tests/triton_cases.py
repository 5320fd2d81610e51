"""Every Triton kernel as it is launched at typical sizes, to be compiled for GPUs that need not be there."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """The arguments of `compile_kernel`; `options` are num_warps and num_stages."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


CASES: list[Case] = []
