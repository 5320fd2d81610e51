"""`autodeploy::linear`: a linear layer for the few rows of a decode step on a CPU.

BLAS libraries split a product [M, I] x [I, O] by rows of the result; with a handful of rows most of the machine has
nothing to do. The transposed product [O, I] x [I, M] has O rows, and reads each weight once, in order. Measured with
all 211 products of a SmolLM2 step on two cores (`benchmarks/linear.py`): 3.6 times faster for 2 rows, even at 16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_ROWS = 16

# By hand rather than by torch.library.custom_op, whose calls cost more.
_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input Wᵀ + bias: input [..., I], weight [O, I], bias [O] -> [..., O], contiguous."""
    rows_MI = input.reshape(-1, input.shape[-1])
    if rows_MI.shape[0] > _MAX_ROWS:
        return F.linear(input, weight, bias)
    out_MO = torch.mm(weight, rows_MI.t()).t().contiguous()
    if bias is not None:
        out_MO += bias
    return out_MO.view(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("autodeploy::linear", lib=_library)
def _(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


OP = torch.ops.autodeploy.linear.default
