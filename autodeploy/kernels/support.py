"""What runs where. It does not import triton, so that the question can be asked where there is none."""

from __future__ import annotations

from importlib.util import find_spec

import torch

# "cuda" is also what torch calls AMD's GPUs. Tests add "cpu" while they run kernels in Triton's interpreter.
DEVICE_TYPES = {"cuda"}


def why_not(device: torch.device) -> str | None:
    """None where Triton kernels run on `device`, else the reason in one line."""
    if device.type not in DEVICE_TYPES:
        return f"Triton kernels need a GPU, not {device.type}"
    return None if find_spec("triton") else "triton is not installed"


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less: what blocks are sized by."""
    return 1 << max(0, number - 1).bit_length()
