"""Linear layers for the few rows of a decode step on a CPU: the transposed product.

BLAS libraries split a product [M, I] x [I, O] by rows of the result; with a handful of rows most of the machine has
nothing to do. The transposed product [O, I] x [I, M] has O rows, and reads each weight once, in order. Measured with
all 211 products of a SmolLM2 step on two cores (`benchmarks/linear.py`): 3.6 times faster for 2 rows, even at 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.ops.linear import Provider

_MAX_ROWS = 16


class TransposedLinear:
    name = "transposed"
    takes_siblings = False

    def why_not(self, weight: Tensor) -> str | None:
        if weight.device.type != "cpu" or weight.dtype is not torch.float32:
            return f"its weight is {weight.dtype} on {weight.device.type}, not float32 on a CPU"
        return None if weight.is_contiguous() else "its weight is not contiguous"

    def takes(self, input: Tensor) -> bool:
        return input.device.type == "cpu" and input.shape[:-1].numel() <= _MAX_ROWS

    def run(self, input: Tensor, weights: list[Tensor], bias: Tensor | None = None) -> list[Tensor]:
        rows_MI = input.reshape(-1, input.shape[-1])
        outputs = []
        for weight in weights:
            out_MO = torch.mm(weight, rows_MI.t()).t().contiguous()
            if bias is not None:
                out_MO += bias
            outputs.append(out_MO.view(*input.shape[:-1], weight.shape[0]))
        return outputs


PROVIDERS: tuple[Provider, ...] = (TransposedLinear(),)
