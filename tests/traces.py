"""Traced tiny models at the stage before each pass, and what every pass owes: equal logits, nothing to do twice."""

from __future__ import annotations

from functools import cache

import torch
from tiny_models import tiny
from torch import Tensor, fx

from autodeploy.compiler import pipeline, spec
from autodeploy.compiler.verify import difference, run_batch
from autodeploy.graph.dependence import split
from autodeploy.graph.edit import PREPARE, Pass, copy_module
from autodeploy.trace import trace
from passes import default

BATCH = ((5, 3), (1, 1), (2, 4))  # sequences of (first chunk, second chunk)


@cache
def _traced(model_type: str, num_layers: int) -> fx.GraphModule:
    return trace(tiny(model_type, num_layers))


def traced(model_type: str, num_layers: int = 4) -> fx.GraphModule:
    """A fresh copy of the trace, made once per session."""
    return copy_module(_traced(model_type, num_layers))


def before(name: str, model_type: str = "llama") -> fx.GraphModule:
    """The graph that the default pipeline hands to the pass `name`."""
    gm, steps = traced(model_type), default()
    pipeline.run(gm, steps[: [step.name for step in steps].index(name)])
    return gm


def text(gm: fx.GraphModule) -> str:
    """The graph, and that of its prepare_metadata."""
    prepare = getattr(gm, PREPARE, None)
    return str(gm.graph) + (str(prepare.graph) if isinstance(prepare, fx.GraphModule) else "")


def logits(gm: fx.GraphModule) -> Tensor:
    """Logits [R, V] of a random ragged batch, whatever the stage of `gm`."""
    gm.recompile()
    with torch.no_grad():
        return run_batch(gm, BATCH, torch.Generator().manual_seed(0))


def apply(step: Pass, gm: fx.GraphModule) -> int:
    """Apply `step` and check what every pass owes; returns its matches."""
    old = logits(gm)
    matches = step.apply(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    spec.check(gm, split(gm), typed=True)
    spec.check_values(gm)
    assert difference(old, logits(gm), exact=not getattr(step, "may_round", False)) is None
    done = text(gm)
    assert step.apply(gm) == 0
    assert text(gm) == done
    return matches


def count(gm: fx.GraphModule, op: object) -> int:
    """How many nodes of `gm` call `op`."""
    return len(gm.graph.find_nodes(op="call_function", target=op))
