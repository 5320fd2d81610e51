"""`out_of_place`: which writes in place become new tensors, and which stay as somebody could tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from autodeploy.graph.in_place import out_of_place


def _read_later(x: Tensor) -> Tensor:
    y = x * 2
    y.div_(3)
    return y + 1


def _view_read_later(x: Tensor) -> Tensor:
    y = x * 2
    part = y[0]
    y.add_(1)
    return part


def _after_view(x: Tensor) -> Tensor:
    return (x * 2).view(12).mul_(3)


# A function of x [3, 4], and how many of its writes become new tensors.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "fresh": (lambda x: (x * 2).div_(3) + 1, 1),
    "two": (lambda x: (x * 2).div_(3).add_(1), 2),
    "behind a view": (_after_view, 1),
    "read later by its old name": (_read_later, 1),
    "a view of it is read later": (_view_read_later, 0),
    "input": (lambda x: x.add_(1) * 2, 0),
    "another dtype": (lambda x: (x * 2).half().mul_(x), 0),
    "not pointwise": (lambda x: (x * 2).cumsum_(0), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_writes_in_place(case: str) -> None:
    function, num_changed = CASES[case]
    x = torch.randn(3, 4)
    gm = torch.export.export(_Module(function), (x,)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    assert out_of_place(gm) == num_changed
    gm.recompile()
    assert torch.equal(gm(x.clone()), function(x.clone()))
    assert out_of_place(gm) == 0


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
