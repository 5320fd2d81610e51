"""Step kinds: what is known of every batch that a step will run, when the step is compiled or captured.

A "mixed" step is right for any batch. A "decode" step may count on this: T == S, padding included, the rows with a
token stand in front, and each of them has one, so that token t is row t's. Whoever runs a decode step keeps that; no
kernel reads it off sizes, which may coincide.

An op that has something to gain takes the kind by the name `step_kind`, "mixed" by default. Backends do not pass it:
the pass `specialize_step` sets it in a copy of the finished graph, and `run_as` around eager code. There is no kind for
steps of k tokens a row, as verifying a draft takes: no kernel would do anything else than in a mixed step.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

StepKind = Literal["mixed", "decode"]
MIXED: StepKind = "mixed"
DECODE: StepKind = "decode"
ARGUMENT = "step_kind"


def takes_step_kind(target: Any) -> bool:
    """Whether an FX node's target is an op that has something to gain."""
    is_op = isinstance(target, torch._ops.OpOverload)
    return is_op and any(argument.name == ARGUMENT for argument in target._schema.arguments)


class run_as(TorchDispatchMode):
    """Within `with run_as("decode"):` eager ops are told that kind of step, as a graph's are by `specialize_step`."""

    def __init__(self, kind: StepKind) -> None:
        super().__init__()
        self._kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        told = {ARGUMENT: self._kind} if takes_step_kind(func) else {}
        return func(*args, **(kwargs or {}), **told)
