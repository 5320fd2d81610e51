"""`autodeploy::linear`, `linears`: linear layers for the few rows of a decode step.

On a CPU: BLAS libraries split a product [M, I] x [I, O] by rows of the result; with a handful of rows most of the
machine has nothing to do. The transposed product [O, I] x [I, M] has O rows, and reads each weight once, in order.
Measured with all 211 products of a SmolLM2 step on two cores (`benchmarks/linear.py`): 3.6 times faster for 2 rows,
even at 16.

On a GPU: a kernel of our own, which takes layers that share their input at once (`kernels/triton_linear.py`).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from autodeploy.ops.registry import triton_kernels

MAX_SIBLINGS = 4
_MAX_ROWS = 16
_GPU_DTYPES = (torch.float16, torch.bfloat16)

# (atol, rtol) against float64, for weights of variance 1 / I and all else of variance 1. The sums are float32, whose
# error stays under 1e-4 where terms cancel; one unit in the last place of the result covers its rounding, and also
# Triton's interpreter, which cuts bfloat16 off instead.
TOLERANCES = {torch.float16: (1e-4, 2**-10), torch.bfloat16: (1e-4, 2**-7)}

# By hand rather than by torch.library.custom_op, whose calls cost more.
_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("linears(Tensor input, Tensor[] weights) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input Wᵀ + bias: input [..., I], weight [O, I], bias [O] -> [..., O], contiguous."""
    if (kernels := _kernels(input)) is not None:
        return kernels.launch(input, [weight], bias)[0]
    rows_MI = input.reshape(-1, input.shape[-1])
    if rows_MI.shape[0] > _MAX_ROWS or input.device.type != "cpu":
        return F.linear(input, weight, bias)
    out_MO = torch.mm(weight, rows_MI.t()).t().contiguous()
    if bias is not None:
        out_MO += bias
    return out_MO.view(*input.shape[:-1], weight.shape[0])


@torch.library.impl(_library, "linears", "CompositeExplicitAutograd")
def linears(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """input Wᵀ of each W: input [..., I], weights [O_i, I] -> [..., O_i], contiguous; at most MAX_SIBLINGS."""
    if (kernels := _kernels(input)) is not None:
        return kernels.launch(input, weights)
    return [linear(input, weight) for weight in weights]


@torch.library.register_fake("autodeploy::linear", lib=_library)
def _(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("autodeploy::linears", lib=_library)
def _(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [input.new_empty(*input.shape[:-1], weight.shape[0]) for weight in weights]


OP = torch.ops.autodeploy.linear.default
SIBLINGS_OP = torch.ops.autodeploy.linears.default


def why_not(weight: Tensor) -> str | None:
    """None where a layer with this weight gains from the ops of this file, else why not."""
    if takes_siblings(weight) or (weight.device.type == "cpu" and weight.dtype is torch.float32):
        return None if weight.is_contiguous() else "its weight is not contiguous"
    return f"its weight is {weight.dtype} on {weight.device.type}, neither half precision on a GPU nor float32 on a CPU"


def takes_siblings(weight: Tensor) -> bool:
    """Whether layers with such weights that read the same input are faster as one."""
    return weight.dtype in _GPU_DTYPES and triton_kernels("triton_linear", weight.device) is not None


def _kernels(input: Tensor) -> ModuleType | None:
    """The kernels, where they are made for `input`: by the time an op runs it has a number of rows."""
    kernels = triton_kernels("triton_linear", input.device) if input.dtype in _GPU_DTYPES else None
    num_rows = input.shape[:-1].numel()
    return kernels if kernels is not None and 0 < num_rows <= kernels.MAX_ROWS else None
