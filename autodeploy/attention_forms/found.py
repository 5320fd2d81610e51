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

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """`output` [.., S, E] is softmax(softcap(Q Kᵀ · scale) + bias + mask) V.

    `bias` are the terms that have no closed form; `seen` is the mask of the rest. `words` name the forms it was in.
    """

    output: fx.Node
    query: Operand
    key: Operand
    value: Operand
    num_heads: int
    num_kv_heads: int
    scale: float
    softcap: float | None
    sinks: fx.Node | None
    bias: tuple[Term, ...]
    seen: Seen
    words: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of `canonical`."""
        return (self.query.node, self.key.node, self.value.node, self.sinks, *(term.node for term in self.bias))

    def canonical(self, query: Any, key: Any, value: Any, sinks: Any, *terms: Any) -> Any:
        """What `output` is, by the canonical op; on tensors, or on proxies that record it."""
        out_dtype = self.output.meta["val"].dtype
        tensors = [
            to_heads(tensor, len(operand.shape), operand.is_transposed, heads)
            for tensor, operand, heads in (
                (query, self.query, self.num_heads),
                (key, self.key, self.num_kv_heads),
                (value, self.value, self.num_kv_heads),
            )
        ]
        dtypes = [operand.node.meta["val"].dtype for operand in (self.query, self.key, self.value)]
        common = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
        tensors = [_cast(tensor, dtype, common) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        bias = None
        for tensor, term in zip(terms, self.bias, strict=True):
            added = _cast(_added(tensor, term, self.num_heads), _dtype(term), common)
            bias = added if bias is None else aten.add.Tensor(bias, added)
        result = torch.ops.autodeploy.attention.default(
            *tensors,
            sinks,
            bias,
            scale=self.scale,
            causal=self.seen.causal,
            window=self.seen.window,
            softcap=self.softcap,
        )
        result = _cast(aten.transpose.int(result, 1, 2), common, out_dtype)
        groups = (self.num_kv_heads, self.num_heads // self.num_kv_heads)
        return from_heads(result, self.output.meta["val"].dim(), groups)


def _cast(tensor: Any, dtype: torch.dtype, wanted: torch.dtype) -> Any:
    return tensor if dtype == wanted else aten.to.dtype(tensor, wanted)


def _dtype(term: Term) -> torch.dtype:
    """That of the scores that a mask without values of its own is added to; they are float32 at least in a softmax."""
    return term.node.meta["val"].dtype if term.role == "add" else torch.float32


def _added(tensor: Any, term: Term, num_heads: int) -> Any:
    """What `term` adds to scores [B, H, S, S], broadcastable to them."""
    if term.role != "add":
        hidden = aten.logical_not.default(tensor) if term.role == "keep" else tensor
        zeros = aten.zeros_like.default(tensor, dtype=torch.float32)
        tensor = aten.masked_fill.Scalar(zeros, hidden, term.fill)
    elif term.factor != 1:
        tensor = aten.mul.Scalar(tensor, term.factor)
    return _to_four(tensor, term.node.meta["val"], term.shape, num_heads)


def _to_four(tensor: Any, recorded: Tensor, scores: torch.Size, num_heads: int) -> Any:
    """`tensor`, broadcastable to `scores` [B * H, S, S] or [B, K, G, S, S], made broadcastable to [B, H, S, S]."""
    ndim = recorded.dim()
    if len(scores) == 3 and ndim == 3 and recorded.shape[0] != 1:
        return aten.unflatten.int(tensor, 0, [-1, num_heads])
    if len(scores) < 5 or ndim < 4:
        if len(scores) == 5 and ndim == 3 and recorded.shape[0] != 1:
            raise Refused("adds another bias to each query of a group")
        return tensor
    per_head = [size != 1 for size in recorded.shape[-4:-2]]
    if any(per_head) and not all(per_head):
        raise Refused("adds a bias to groups of heads")
    return aten.flatten.using_ints(tensor, ndim - 4, ndim - 3)
