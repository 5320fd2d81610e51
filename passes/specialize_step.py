"""Tell the ops of a finished graph which kind of step it is compiled or captured for.

Before:                                              After, for decode steps:
    y = triton_paged_attention(q, k, ..., span=...)      y = triton_paged_attention(..., step_kind="decode")

Not in the default list: the graph of all passes runs any batch, and this one is made beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from autodeploy.graph.edit import PREPARE, prepare_nodes
from autodeploy.ops.step_kind import ARGUMENT, DECODE, MIXED, StepKind, takes_step_kind


@dataclass(frozen=True)
class SpecializeStep:
    """Set `kind` in every op that asks for it, those in prepare_metadata included; matches as many.

    The graph may then be run with batches of that kind alone (`ops/step_kind.py`).
    """

    kind: StepKind = DECODE
    name: str = "specialize_step"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        matches = 0
        for module in (gm, *(getattr(gm, PREPARE) for _ in prepare_nodes(gm))):
            nodes = [node for node in module.graph.nodes if takes_step_kind(node.target)]
            for node in nodes:
                if node.kwargs.get(ARGUMENT, MIXED) != self.kind:
                    node.kwargs = {**node.kwargs, ARGUMENT: self.kind}
                    matches += 1
            module.recompile()
        return matches
