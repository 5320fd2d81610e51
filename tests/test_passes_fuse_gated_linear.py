"""fuse_gated_linear: one op for two layers and their gate."""

from __future__ import annotations

import pytest
import torch
from interpreter import triton_device as triton_device
from torch import fx, nn
from torch.nn import functional as F

from autodeploy.effects import is_needed
from autodeploy.graph import take_near_misses
from autodeploy.ops.linear import GATED_OP, TOLERANCES
from passes import FuseGatedLinear


class Mlp(nn.Module):
    def __init__(self, bias: bool = False, reads_up_twice: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=bias)
        self.reads_up_twice = reads_up_twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate(x), self.up(x)
        out = F.silu(gate) * up
        return out + up if self.reads_up_twice else out


def _exported(mlp: Mlp, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> fx.GraphModule:
    x = torch.randn(1, 3, 8, dtype=dtype, device=device)
    gm = torch.export.export(mlp.to(device, dtype), (x,)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def test_fuses_once(triton_device: torch.device) -> None:
    gm = _exported(Mlp(), triton_device)
    x = torch.randn(1, 3, 8, dtype=torch.bfloat16, device=triton_device)
    expected = gm(x)
    assert FuseGatedLinear().apply(gm) == 1
    gm.graph.eliminate_dead_code(is_needed)
    gm.recompile()
    (op,) = (node for node in gm.graph.nodes if node.op == "call_function")
    assert op.target is GATED_OP
    # The layers used to be rounded in between.
    torch.testing.assert_close(gm(x), expected, atol=1e-2, rtol=4 * TOLERANCES[torch.bfloat16][1])
    assert FuseGatedLinear().apply(gm) == 0


@pytest.mark.parametrize(
    ("mlp", "reason"), [(Mlp(bias=True), "has a bias"), (Mlp(reads_up_twice=True), "has other readers")]
)
def test_refuses(mlp: Mlp, reason: str, triton_device: torch.device) -> None:
    gm = _exported(mlp, triton_device)
    assert FuseGatedLinear().apply(gm) == 0
    ((_, said),) = take_near_misses(gm)
    assert reason in said


def test_leaves_a_cpu_alone() -> None:
    gm = _exported(Mlp(), torch.device("cpu"), torch.float32)
    assert FuseGatedLinear().apply(gm) == 0
    ((_, said),) = take_near_misses(gm)
    assert "on a GPU" in said
