"""An attention as it was found in a graph, and its canonical form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.attention_forms.asked import Seen
from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.heads import Operand, from_heads, to_heads
from autodeploy.attention_forms.scores import Term
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """`output`, with dimensions `output_dims` (`heads`), is softmax(softcap(Q Kᵀ · scale) + bias + alibi + mask) V.

    `bias` are the terms that have no closed form; `seen` is the mask of the rest. `words` name the forms it was in.
    """

    output: fx.Node
    output_dims: str
    query: Operand
    key: Operand
    value: Operand
    num_heads: int
    num_kv_heads: int
    scale: float
    softcap: float | None
    sinks: fx.Node | None
    alibi_slopes: Tensor | None
    bias: tuple[Term, ...]
    seen: Seen
    words: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of `canonical`."""
        nodes = (self.query.node, self.key.node, self.value.node, self.sinks)
        return (*nodes, self.alibi_slopes, *(term.node for term in self.bias))

    def canonical(self, query: Any, key: Any, value: Any, sinks: Any, alibi_slopes: Any, *terms: Any) -> Any:
        """What `output` is, by the canonical op; on tensors, or on proxies that record it."""
        out_dtype = VALUE.of(self.output).dtype
        tensors = [
            to_heads(tensor, operand.dims, heads)
            for tensor, operand, heads in (
                (query, self.query, self.num_heads),
                (key, self.key, self.num_kv_heads),
                (value, self.value, self.num_kv_heads),
            )
        ]
        dtypes = [VALUE.of(operand.node).dtype for operand in (self.query, self.key, self.value)]
        common = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
        tensors = [_cast(tensor, dtype, common) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        bias = None
        for tensor, term in zip(terms, self.bias, strict=True):
            bias = _changed(bias, to_four(tensor, term, self.num_heads), term, common)
        result = torch.ops.autodeploy.attention.default(
            *tensors,
            sinks,
            bias,
            alibi_slopes=alibi_slopes,
            scale=self.scale,
            causal=self.seen.causal,
            span=self.seen.span.name,
            softcap=self.softcap,
        )
        return _cast(from_heads(result, self.output_dims, VALUE.of(self.output).shape), common, out_dtype)


def _cast(tensor: Any, dtype: torch.dtype, wanted: torch.dtype) -> Any:
    return tensor if dtype == wanted else aten.to.dtype(tensor, wanted)


def _changed(bias: Any, tensor: Any, term: Term, dtype: torch.dtype) -> Any:
    """The `bias` so far, or None, and what `term` makes of it; in the order of the terms, as a mask replaces."""
    if term.role != "add":
        hidden = aten.logical_not.default(tensor) if term.role == "keep" else tensor
        if bias is None:
            return aten.to.dtype(aten.where.Scalar(hidden, term.fill, 0.0), dtype)
        return aten.where.ScalarSelf(hidden, term.fill, bias)
    if term.factor != 1:
        tensor = aten.mul.Scalar(tensor, term.factor)
    tensor = _cast(tensor, VALUE.of(term.node).dtype, dtype)
    return tensor if bias is None else aten.add.Tensor(bias, tensor)


def to_four(tensor: Any, term: Term, num_heads: int) -> Any:
    """The tensor of `term`, broadcastable to scores of another shape, made so to [B, H, S, S]."""
    recorded: Tensor = VALUE.of(term.node)
    ndim, scores_ndim = recorded.dim(), len(term.shape)
    if scores_ndim == 3 and ndim == 3 and recorded.shape[0] != 1:
        return aten.unflatten.int(tensor, 0, [-1, num_heads])
    if scores_ndim < 5 or ndim < 3:
        return tensor
    per_head = [size != 1 for size in (1, *recorded.shape)[-4:-2]]
    if any(per_head) and not all(per_head):
        raise Refused("adds a bias to groups of heads")
    return aten.flatten.using_ints(tensor, ndim - 4, ndim - 3) if ndim > 3 else tensor
