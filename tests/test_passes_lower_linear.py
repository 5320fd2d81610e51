"""lower_linear: the same numbers from the product that suits few rows."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from autodeploy.graph import take_near_misses
from autodeploy.ops.linear import OP
from passes import LowerLinear


def _exported(layer: nn.Linear) -> fx.GraphModule:
    gm = torch.export.export(layer, (torch.randn(1, 3, 8, dtype=layer.weight.dtype),)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_linear(rows: int, has_bias: bool) -> None:
    input, weight, bias = torch.randn(1, rows, 24), torch.randn(40, 24), torch.randn(40) if has_bias else None
    torch.testing.assert_close(OP(input, weight, bias), F.linear(input, weight, bias))
    torch.library.opcheck(OP, (input, weight, bias))


def test_replaces_linear_once() -> None:
    gm = _exported(nn.Linear(8, 4))
    x = torch.randn(1, 3, 8)
    expected = gm(x)
    assert LowerLinear().apply(gm) == 1
    gm.recompile()
    torch.testing.assert_close(gm(x), expected)
    assert LowerLinear().apply(gm) == 0


def test_other_dtypes_are_left_alone() -> None:
    gm = _exported(nn.Linear(8, 4, dtype=torch.bfloat16))
    assert LowerLinear().apply(gm) == 0
    ((_, reason),) = take_near_misses(gm)
    assert "not torch.float32" in reason
