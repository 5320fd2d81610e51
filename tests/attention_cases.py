"""Attention as models and other projects write it: a module for each combination of how its parts are spelled.

A `Case` names one spelling per part; `Written(case)` is the module, from hidden states [B, S, E] to [B, S, E].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS, HEAD_DIM, WINDOW, LONGEST = 4, 16, 3, 64
HIDDEN_SIZE = HEADS * HEAD_DIM
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Case:
    """How each part is written; the defaults are those of a plain eager model."""

    product: str = "matmul"
    num_kv_heads: int = 2
    repeat: str = "expand"  # "none": broadcast, or enable_gqa
    repeat_first: bool = False  # of [B, S, K, D], before the transpose
    scale: str = "mul"
    mask: str = "masked_fill"
    fill: float | str = "-inf"
    softmax: str = "plain"
    span: str = "full"
    rope: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != vars(Case())[name]]
        return ",".join(changed).replace("torch.", "") or "plain"


class Written(nn.Module):
    """The attention of `case` between projections with random weights."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        torch.manual_seed(0)
        kv_size = case.num_kv_heads * HEAD_DIM
        self.q, self.o = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.k, self.v = nn.Linear(HIDDEN_SIZE, kv_size), nn.Linear(HIDDEN_SIZE, kv_size)
        for linear in (self.q, self.k, self.v):
            linear.weight.data.mul_(2)
        self.sink = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        self.register_buffer("causal", torch.ones(LONGEST, LONGEST).tril().bool().view(1, 1, LONGEST, LONGEST))
        self.register_buffer("low", torch.tensor(self.fill))
        self.to(case.dtype)

    @property
    def fill(self) -> float:
        fill = self.case.fill
        return fill if isinstance(fill, float) else -math.inf if fill == "-inf" else torch.finfo(self.case.dtype).min

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, HEAD_DIM)
        k, v = (linear(x).view(batch, length, self.case.num_kv_heads, HEAD_DIM) for linear in (self.k, self.v))
        if self.case.rope:
            q, k = _rotated(q), _rotated(k)
        if self.case.repeat_first:
            k, v = (self._repeated(tensor, 2) for tensor in (k, v))
        if self.case.product != "einsum_bsnd":
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if not self.case.repeat_first:
            k, v = (self._repeated(tensor, 2 if self.case.product == "einsum_bsnd" else 1) for tensor in (k, v))
        attend = self._sdpa if self.case.product.startswith("sdpa") else self._eager
        return self.o(attend(q, k, v).reshape(batch, length, HIDDEN_SIZE))

    def _repeated(self, tensor: Tensor, dim: int) -> Tensor:
        times = HEADS // self.case.num_kv_heads
        if self.case.repeat == "none" or times == 1:
            return tensor
        if self.case.repeat == "interleave":
            return tensor.repeat_interleave(times, dim=dim)
        if self.case.repeat == "stack":
            return torch.stack([tensor] * times, dim + 1).flatten(dim, dim + 1)
        if self.case.repeat == "repeat":
            times_per_dim = [1] * (dim + 1) + [times] + [1] * (3 - dim)
            return tensor.unsqueeze(dim + 1).repeat(times_per_dim).flatten(dim, dim + 1)
        shape = list(tensor.shape)
        wide = tensor.unsqueeze(dim + 1).expand(*shape[: dim + 1], times, *shape[dim + 1 :])
        return wide.reshape(*shape[:dim], HEADS, *shape[dim + 1 :])

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        case = self.case
        options: dict[str, Any] = {"enable_gqa": True} if case.repeat == "none" else {}
        if case.product == "sdpa_causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2)
        seen = self._seen(q.shape[2])
        mask = seen if case.mask == "masked_fill" else self._added(seen, q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options).transpose(1, 2)

    def _eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, S, H, D]."""
        case, length = self.case, q.shape[1 if self.case.product == "einsum_bsnd" else 2]
        if case.scale in ("query", "both"):
            q = q * (SCALE if case.scale == "query" else math.sqrt(SCALE))
            k = k if case.scale == "query" else k * math.sqrt(SCALE)
        scores = self._scaled(self._scores(q, k))
        if case.softcap:
            scores = torch.tanh(scores / 2.0) * 2.0
        scores = _MASKS[case.mask](self, scores, self._seen(length))
        if case.sinks:
            sinks = self.sink.view(1, -1, 1, 1).expand(scores.shape[0], -1, length, -1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = _SOFTMAXES[case.softmax](scores)
        weights = weights[..., :-1] if case.sinks else weights
        if case.dropout:
            weights = F.dropout(weights, 0.0, training=True)
        return self._weighed(weights, v)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, S, S]."""
        if self.case.product == "einsum_grouped":
            return torch.einsum("bkgqd,bksd->bkgqs", q.unflatten(1, (k.shape[1], -1)), k).flatten(1, 2)
        if self.case.product == "einsum_bsnd":
            return torch.einsum("bqhd,bkhd->bhqk", q, k)
        if self.case.product == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", q, k)
        if self.case.product == "bmm":
            batch, heads, length, dim = q.shape
            q, k = (tensor.reshape(-1, length, dim) for tensor in (q, k))
            return torch.bmm(q, k.transpose(1, 2)).view(batch, heads, length, length)
        return torch.matmul(q, k.transpose(-2, -1))

    def _weighed(self, weights: Tensor, v: Tensor) -> Tensor:
        if self.case.product == "einsum_grouped":
            weights = weights.unflatten(1, (v.shape[1], -1))
            return torch.einsum("bkgqs,bksd->bqkgd", weights, v).flatten(2, 3)
        if self.case.product == "einsum_bsnd":
            return torch.einsum("bhqk,bkhd->bqhd", weights, v)
        if self.case.product == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2)
        if self.case.product == "bmm":
            batch, heads, length, dim = v.shape
            out = torch.bmm(weights.view(-1, length, length), v.reshape(-1, length, dim))
            return out.view(batch, heads, length, dim).transpose(1, 2)
        return torch.matmul(weights, v).transpose(1, 2).contiguous()

    def _scaled(self, scores: Tensor) -> Tensor:
        return _SCALES.get(self.case.scale, lambda scores: scores)(scores)

    def _seen(self, length: int) -> Tensor:
        """[1, 1, S, S] bool, where a query sees a key."""
        if self.case.mask == "buffer":
            return self.causal[:, :, :length, :length]
        if self.case.mask in ("triu", "add_"):
            return ~torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)[None, None] & self._near(length)
        if self.case.mask == "where_tril":
            return torch.tril(torch.ones(length, length)).bool()[None, None] & self._near(length)
        index = torch.arange(length)
        return ((index[None, :] <= index[:, None]) & self._near(length))[None, None]

    def _near(self, length: int) -> Tensor:
        index = torch.arange(length)
        if self.case.span == "window":
            return index[None, :] > index[:, None] - WINDOW
        if self.case.span == "chunk":
            return index[None, :] // WINDOW == index[:, None] // WINDOW
        return torch.ones(length, length, dtype=torch.bool)

    def _added(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, self.fill)


def _rotated(x: Tensor) -> Tensor:
    """`x` [B, S, H, D] turned by its place."""
    angles = torch.arange(x.shape[1])[:, None, None] / 10 ** torch.arange(HEAD_DIM // 2)
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)
    return turned.to(x.dtype)


def _triu_of_fill(written: Written, scores: Tensor, seen: Tensor) -> Tensor:
    length = scores.shape[-1]
    return scores + torch.triu(torch.full((length, length), written.fill, dtype=scores.dtype), diagonal=1)


def _one_minus(written: Written, scores: Tensor, seen: Tensor) -> Tensor:
    return scores + (1.0 - seen.to(scores.dtype)) * written.fill


def _filled_in_place(written: Written, scores: Tensor, seen: Tensor) -> Tensor:
    mask = torch.empty(scores.shape[-2:], dtype=scores.dtype)
    mask.fill_(written.fill)
    return scores + mask.triu_(1)


def _put(written: Written, scores: Tensor, seen: Tensor) -> Tensor:
    scores[:, :, ~seen[0, 0]] = written.fill
    return scores


def _put_in_mask(written: Written, scores: Tensor, seen: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape[-2:], dtype=scores.dtype)
    mask[~seen[0, 0]] = written.fill
    return scores + mask


def _exp_over_sum(scores: Tensor) -> Tensor:
    weights = torch.exp(scores)
    return weights / weights.sum(-1, keepdim=True)


def _times_reciprocal(scores: Tensor) -> Tensor:
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return weights * weights.sum(-1, keepdim=True).reciprocal()


def _exp_of_difference(scores: Tensor) -> Tensor:
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / torch.sum(weights, dim=-1, keepdim=True)


Mask = Callable[[Written, Tensor, Tensor], Tensor]
_MASKS: dict[str, Mask] = {
    "none": lambda written, scores, seen: scores,
    "masked_fill": lambda written, scores, seen: scores.masked_fill(~seen, written.fill),
    "masked_fill_": lambda written, scores, seen: scores.masked_fill_(~seen, written.fill),
    "where": lambda written, scores, seen: torch.where(seen, scores, written.fill),
    "where_tril": lambda written, scores, seen: torch.where(seen, scores, written.low),
    "buffer": lambda written, scores, seen: torch.where(seen, scores, written.low),
    "add": lambda written, scores, seen: scores + written._added(seen, scores.dtype),
    "add_": lambda written, scores, seen: scores.add_(written._added(seen, scores.dtype)),
    "iadd": lambda written, scores, seen: scores.__iadd__(written._added(seen, scores.dtype)),
    "triu": lambda written, scores, seen: scores.masked_fill(~seen, written.fill),
    "triu_of_fill": _triu_of_fill,
    "one_minus": _one_minus,
    "filled_in_place": _filled_in_place,
    "put": _put,
    "put_in_mask": _put_in_mask,
}
_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "mul": lambda scores: scores * SCALE,
    "div": lambda scores: scores / math.sqrt(HEAD_DIM),
    "mul_": lambda scores: scores.mul_(SCALE),
    "div_": lambda scores: scores.div_(math.sqrt(HEAD_DIM)),
    "tensor": lambda scores: scores / torch.sqrt(torch.tensor(HEAD_DIM, dtype=scores.dtype)),
    "full": lambda scores: scores / torch.full([], HEAD_DIM**0.5, dtype=scores.dtype),
}
_SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda scores: F.softmax(scores, dim=-1),
    "float32": lambda scores: F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype),
    "upcast": lambda scores: torch.softmax(scores.float(), -1).type_as(scores),
    "exp": _exp_over_sum,
    "exp_max": _exp_of_difference,
    "reciprocal": _times_reciprocal,
}

SPELLINGS: dict[str, list[Any]] = {
    "product": ["matmul", "bmm", "einsum", "einsum_bsnd", "einsum_grouped", "sdpa", "sdpa_causal"],
    "num_kv_heads": [1, 2, 4],
    "repeat": ["expand", "interleave", "stack", "repeat", "none"],
    "repeat_first": [False, True],
    "scale": [*_SCALES, "query", "both", "none"],
    "mask": [*_MASKS],
    "fill": ["-inf", "min", -65504.0, -1e4, -1e5, -1e9],
    "softmax": [*_SOFTMAXES],
    "span": ["full", "window", "chunk"],
    "rope": [False, True],
    "softcap": [False, True],
    "sinks": [False, True],
    "dropout": [False, True],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
}
_WITHOUT_SPAN = {"triu_of_fill", "where_tril", "buffer", "none", "filled_in_place"}


def is_written(case: Case) -> bool:
    """Whether anybody would write `case`: other combinations fail in torch, or ignore one of their parts."""
    is_sdpa = case.product.startswith("sdpa")
    if case.dtype == torch.float16 and isinstance(case.fill, float) and case.fill < -65504:
        return False
    if case.span != "full" and (case.mask in _WITHOUT_SPAN or case.product == "sdpa_causal"):
        return False
    if case.mask == "one_minus" and case.fill == "-inf":
        return False
    if case.dtype == torch.float16 and case.softmax == "exp" and case.scale == "none":
        return False
    if case.product == "einsum_grouped":
        return case.repeat == "none" and not case.repeat_first
    if case.repeat == "none" and not is_sdpa and case.num_kv_heads < HEADS:
        return case.product == "matmul" and case.num_kv_heads == 1
    if not is_sdpa:
        return True
    plain = Case(mask=case.mask)
    parts = ("sinks", "softcap", "softmax", "dropout", "scale")
    is_plain = all(getattr(case, part) == getattr(plain, part) for part in parts)
    return is_plain and case.mask in ("masked_fill", "add", "triu", "buffer")
