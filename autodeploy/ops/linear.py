"""`autodeploy::linear`, `linears`: linear layers for the few rows of a decode step.

The ops mean `F.linear`. Providers compute them faster (`kernels/transposed_linear.py` on a CPU,
`kernels/triton_linear.py` on a GPU): the first that takes the operands of a call does.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_SIBLINGS = 4

# (atol, rtol) against float64, for weights of variance 1 / I and all else of variance 1. The sums are float32, whose
# error stays under 1e-4 where terms cancel; one unit in the last place of the result covers its rounding, and also
# Triton's interpreter, which cuts bfloat16 off instead.
TOLERANCES = {torch.float16: (1e-4, 2**-10), torch.bfloat16: (1e-4, 2**-7)}

# By hand rather than by torch.library.custom_op, whose calls cost more.
_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("linears(Tensor input, Tensor[] weights) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


class Provider(Protocol):
    """One way to compute linear layers of few rows."""

    name: str
    takes_siblings: bool  # layers that read the same input are faster as one

    def why_not(self, weight: Tensor) -> str | None:
        """None where layers with this weight gain, else why not: asked when a graph is made."""
        ...

    def takes(self, input: Tensor) -> bool:
        """Whether this computes layers of `input`: asked at each call, as only then it has a number of rows."""
        ...

    def run(self, input: Tensor, weights: list[Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """What `linears` gives; `bias` where there is one weight."""
        ...


providers: list[Provider] = []  # in order of preference


def choose(weight: Tensor) -> tuple[Provider | None, str]:
    """The provider for layers with this weight, or None with the reason of each."""
    reasons = []
    for provider in providers:
        reason = provider.why_not(weight)
        if reason is None:
            return provider, ""
        reasons.append(f"{provider.name}: {reason}")
    return None, "; ".join(reasons) or "no provider is loaded"


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input Wᵀ + bias: input [..., I], weight [O, I], bias [O] -> [..., O], contiguous."""
    for provider in providers:
        if provider.takes(input):
            return provider.run(input, [weight], bias)[0]
    return F.linear(input, weight, bias)


@torch.library.impl(_library, "linears", "CompositeExplicitAutograd")
def linears(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """input Wᵀ of each W: input [..., I], weights [O_i, I] -> [..., O_i], contiguous; at most MAX_SIBLINGS."""
    for provider in providers:
        if provider.takes(input):
            return provider.run(input, weights)
    return [F.linear(input, weight) for weight in weights]


@torch.library.register_fake("autodeploy::linear", lib=_library)
def _(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("autodeploy::linears", lib=_library)
def _(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [input.new_empty(*input.shape[:-1], weight.shape[0]) for weight in weights]


OP = torch.ops.autodeploy.linear.default
SIBLINGS_OP = torch.ops.autodeploy.linears.default
