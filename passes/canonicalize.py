"""Drop what an export leaves behind and no computation needs: checks, casts and views to the same, wrapped regions.

Before:                                             After:
    _assert_tensor_metadata(x, dtype=float32)           y = mul(x, 2)
    x1 = to.dtype(x, float32)                           return linear(y, w)
    y1 = wrap_with_set_grad_enabled(False, body, x1)
    y = transpose(transpose(y1[0], 1, 2), 1, 2)
    return linear(slice(y, 0, 0, 9223372036854775807), w)

`autodeploy.graph.canonical` holds the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autodeploy.graph.canonical import canonicalize


@dataclass(frozen=True)
class Canonicalize:
    """Leave only nodes that compute something; `apply` returns how many nodes went away."""

    name: str = "canonicalize"

    def apply(self, gm: fx.GraphModule) -> int:
        return canonicalize(gm)
