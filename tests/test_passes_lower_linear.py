"""lower_linear: the same numbers from the product that suits few rows."""

from __future__ import annotations

import pytest
import torch
from interpreter import triton_device as triton_device
from torch import fx, nn
from torch.nn import functional as F

from autodeploy.graph.edit import take_near_misses
from autodeploy.ops.linear import OP, SIBLINGS_OP
from passes import LowerLinear


class Mlp(nn.Module):
    """Five layers of one input, one of them with a bias, and one layer of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.siblings = nn.ModuleList(nn.Linear(8, size, bias=size == 6) for size in (16, 16, 6, 16, 16, 16))
        self.down = nn.Linear(16, 8, bias=False)
        self.siblings[5].weight = self.siblings[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e, f = (layer(x) for layer in self.siblings)
        return self.down(F.silu(a) * b + d + e * f) + c.sum()


def _exported(layer: nn.Module, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    x = torch.randn(1, 3, 8, dtype=dtype, device=next(layer.parameters()).device)
    gm = torch.export.export(layer.to(dtype), (x,)).module(check_guards=False)
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
    gm = _exported(nn.Linear(8, 4), torch.bfloat16)
    assert LowerLinear().apply(gm) == 0
    ((_, reason),) = take_near_misses(gm)
    assert "torch.bfloat16 on cpu" in reason


def test_siblings_become_one_on_a_gpu(triton_device: torch.device) -> None:
    gm = _exported(Mlp().to(triton_device), torch.bfloat16)
    x = torch.randn(1, 3, 8, dtype=torch.bfloat16, device=triton_device)
    expected = gm(x)
    assert LowerLinear().apply(gm) == 7
    gm.graph.lint()
    gm.recompile()
    merged = gm.graph.find_nodes(op="call_function", target=SIBLINGS_OP)
    assert [len(node.args[1]) for node in merged] == [4]
    assert len(gm.graph.find_nodes(op="call_function", target=OP)) == 3
    torch.testing.assert_close(gm(x), expected, atol=3e-2, rtol=3e-2)
    assert LowerLinear().apply(gm) == 0


def test_siblings_stay_apart_on_a_cpu() -> None:
    gm = _exported(Mlp())
    assert LowerLinear().apply(gm) == 7
    assert not gm.graph.find_nodes(op="call_function", target=SIBLINGS_OP)
