"""Raw graphs of one hand-written attention each, and what find_attention makes of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from autodeploy.trace.aten import from_export
from passes import Canonicalize, FindAttention

ATTENTION = torch.ops.autodeploy.attention.default
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
Form = Callable[..., Tensor]


def tensors(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, H, S, D], key and value [B, K, S, D]."""
    generator = torch.Generator().manual_seed(batch * length)
    shapes = [(batch, heads, length, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def export(form: Form, inputs: tuple[Tensor, ...], max_length: int | None = None) -> fx.GraphModule:
    """The canonicalized graph of `form(*inputs)`, for any size where a dimension is 3 (the batch) or 7 (the length)."""
    model = form if isinstance(form, torch.nn.Module) else torch.nn.Module()
    if model is not form:
        model.forward = form
    dims = {3: torch.export.Dim("batch", min=2), 7: torch.export.Dim("length", min=3, max=max_length)}
    shapes = tuple({dim: dims[size] for dim, size in enumerate(x.shape) if size in dims} for x in inputs)
    with torch.no_grad():
        gm = from_export(torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False))
    Canonicalize().apply(gm)
    return gm


def reduced(gm: fx.GraphModule) -> fx.Node:
    """The one canonical node after find_attention, which leaves nothing to do for a second one."""
    assert FindAttention().apply(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    done = str(gm.graph)
    assert FindAttention().apply(gm) == 0
    assert str(gm.graph) == done
    (node,) = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    return node
