"""Tensors of the same bytes, each told from the first by one thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

COMPLEX = torch.zeros(2, 1, dtype=torch.complex64)
FORMS: dict[str, Tensor] = {
    "first": torch.zeros(2, 2),
    "shape": torch.zeros(4, 1),
    "strides": torch.zeros(2, 2).t(),
    "dtype": torch.zeros(2, 2, dtype=torch.int32),
    "wider dtype": torch.zeros(2, 1, dtype=torch.float64),
    "complex": COMPLEX,
    "conjugated": COMPLEX.clone().conj(),
    "negated": torch._neg_view(torch.zeros(2, 2)),
    "with a gradient": torch.zeros(2, 2, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False),
    "part of its memory": torch.zeros(2, 2, 2)[0],
    "another part": torch.zeros(2, 2, 2)[1],
    "without memory": torch.zeros(2, 2, device="meta"),
}


def plain(*left_out: str) -> dict[str, Tensor]:
    """Those whose bytes can be read, but for those named."""
    lazy = {"conjugated", "negated", "without memory"}
    return {name: value for name, value in FORMS.items() if name not in lazy and name not in left_out}


@contextmanager
def on_another_device(moved: Tensor) -> Iterator[None]:
    """`moved` says that it is on a GPU, which not every machine has."""
    own = torch.Tensor.device
    with pytest.MonkeyPatch.context() as patch:
        there = property(lambda tensor: torch.device("cuda") if tensor is moved else own.__get__(tensor))
        patch.setattr(torch.Tensor, "device", there)
        yield
