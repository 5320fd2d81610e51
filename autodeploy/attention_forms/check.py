"""The last word on a match: does its canonical form give what the graph gives?"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from autodeploy.attention_forms.asked import Sizes
from autodeploy.attention_forms.evaluate import Evaluator
from autodeploy.attention_forms.found import Attention
from autodeploy.graph.meta import VALUE

_LENGTH, _BATCH = 7, 2
# Of random values of size one, by dtype: a softmax in float32 on one side and in this dtype on the other.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def check(gm: fx.GraphModule, found: Attention, sizes: Sizes) -> str | None:
    """None where the canonical form of `found` gives the graph's numbers for random inputs, else why it must not be."""
    length = found.query.shape[-2]
    evaluator = Evaluator(gm, sizes.at(length, _LENGTH, _BATCH))
    generator = torch.Generator().manual_seed(0)
    given = {node: _random(evaluator, VALUE.of(node), generator) for node in found.inputs if isinstance(node, fx.Node)}
    # Scores of size one: larger ones are rounded more than weights can bear.
    size = found.scale * found.query.shape[found.query.dims.index("d")] ** 0.5 / (found.softcap or 1.0)
    given[found.query.node] /= max(1.0, size)
    with torch.no_grad():
        graph = Evaluator(gm, sizes.at(length, _LENGTH, _BATCH), given)(found.output)
        canonical = found.canonical(*(given[arg] if isinstance(arg, fx.Node) else arg for arg in found.inputs))
    if graph.shape != canonical.shape:
        return f"has a canonical form of shape {list(canonical.shape)} instead of {list(graph.shape)}"
    # A mask that is drawn at random may hide everything from some query, which is NaN on both sides or on none.
    if torch.allclose(graph, canonical, atol=_TOLERANCES.get(graph.dtype, 0.0), rtol=0, equal_nan=True):
        return None
    return f"has a canonical form that gives other numbers, by {(graph - canonical).abs().max().item():.2g}"


def _random(evaluator: Evaluator, recorded: Tensor, generator: torch.Generator) -> Tensor:
    shape = evaluator.shape(recorded)
    if recorded.dtype is torch.bool:
        return torch.rand(shape, generator=generator).gt(0.5).to(recorded.device)
    return torch.randn(shape, generator=generator).to(recorded.device, recorded.dtype)
