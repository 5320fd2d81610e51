"""The catalogue: every tensor that can be derived from the layout, each by one plain formula.

A field is an op in the namespace `autodeploy_field` whose body *is* its formula, so that it is a leaf in FX graphs
(equal fields merge by name and parameters) and ordinary ATen once Inductor sees it.

Shapes: S sequences, T packed tokens (padding included), P pages per sequence, p page size, L = P * p.
Padding rows have query_len = context_len = 0; padding tokens are those from cu_seqlens_q[S] on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer, Proxy

from autodeploy import values
from autodeploy.dependence import find_scalars
from autodeploy.errors import OptionError, UnknownName
from autodeploy.metadata.layout import CONTEXT_LEN, NUM_FIXED_COLUMNS, QUERY_LEN, STATE_SLOT

NAMESPACE = "autodeploy_field"
_library = torch.library.Library(NAMESPACE, "DEF")
_catalogue: dict[str, Field] = {}


@dataclass(frozen=True)
class Field:
    """One entry of the catalogue.

    `shape` is in the letters above; `depends` is what the value depends on beside the batch itself: any of "P" (page
    size), "G" (KV group), "W" (window), "H" (head configuration or kernel size); `padding` says what padding rows or
    tokens hold.
    """

    name: str
    formula: Callable[..., Tensor]
    op: torch._ops.OpOverload
    shape: str
    depends: str
    padding: str
    meaning: str
    device: str = "device"


def field(
    *, shape: str, depends: str = "", padding: str = "", device: str = "device"
) -> Callable[..., Callable[..., Tensor]]:
    """Register a formula as a field and return the op that computes it.

    The formula takes `layout` [S, C] int32 first, then `num_tokens` where it makes something per token, then int
    parameters; its docstring's first line is its meaning. It must be pure, in plain torch, with annotations.
    """

    def register(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = formula.__name__
        if name in _catalogue:
            raise OptionError(f"field {name!r} is registered twice", where=inspect.getfile(formula), fix="rename it")
        schema = torch.library.infer_schema(formula, mutates_args=())
        _library.define(f"{name}{schema}")
        _library.impl(name, formula, "CompositeImplicitAutograd")
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        values.formulas[op] = formula
        meaning = (formula.__doc__ or name).strip().splitlines()[0]
        _catalogue[name] = Field(name, formula, op, shape, depends, padding, meaning, device)
        return op

    return register


@cache
def _load() -> None:
    import_module("autodeploy.metadata.fields_torch")
    import_module("autodeploy.metadata.fields_tiles")
    import_module("autodeploy.metadata.fields_flashinfer")
    import_module("autodeploy.metadata.fields_conv1d")
    for point in entry_points(group="autodeploy.fields"):
        point.load()


def catalogue() -> tuple[Field, ...]:
    """Every registered field, ours first."""
    _load()
    return tuple(_catalogue.values())


def get(name: str) -> Field:
    """The field called `name`; raises UnknownName."""
    _load()
    if name not in _catalogue:
        raise UnknownName("field", name, _catalogue)
    return _catalogue[name]


def of_op(op: object) -> Field:
    """The field that an FX node's target computes."""
    return next(entry for entry in _catalogue.values() if entry.op is op)


@cache
def num_ops(target: Any) -> int:
    """How many torch ops a node with this target comes to: 1, or those of its formula where it is a field."""
    if not is_field(target):
        return 1
    formula = of_op(target).formula
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    formula(*(Proxy(graph.placeholder(name), tracer) for name in inspect.signature(formula).parameters))
    scalars = find_scalars(graph)
    ops = [node for node in graph.nodes if node.op in ("call_function", "call_method") and node not in scalars]
    return sum(num_ops(node.target) for node in ops)


def is_field(target: object) -> bool:
    """Whether an FX node's target is a field."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


@field(shape="[S] int32", padding="0")
def query_lens(layout: Tensor) -> Tensor:
    """q: new tokens of each sequence in this step."""
    return layout[:, QUERY_LEN]


@field(shape="[S] int32", padding="0")
def context_lens(layout: Tensor) -> Tensor:
    """c: tokens of each sequence that are cached already."""
    return layout[:, CONTEXT_LEN]


@field(shape="[S] int32", padding="0")
def seq_lens(layout: Tensor) -> Tensor:
    """s = c + q: tokens of each sequence once this step is written."""
    return layout[:, CONTEXT_LEN] + layout[:, QUERY_LEN]


@field(shape="[S + 1] int32", padding="the total")
def cu_seqlens_q(layout: Tensor) -> Tensor:
    """[0, cumsum q]: where each sequence starts in the packed stream."""
    return torch.nn.functional.pad(layout[:, QUERY_LEN].cumsum(0, dtype=torch.int32), (1, 0))


@field(shape="[T] int32", padding="the last row")
def token_to_seq(layout: Tensor, num_tokens: int) -> Tensor:
    """Which sequence each packed token belongs to: searchsorted(cu_seqlens_q, t, right) - 1."""
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=layout.device)
    row_T = torch.searchsorted(cu_seqlens_q(layout), token_T, right=True, out_int32=True) - 1
    return row_T.clamp(max=layout.shape[0] - 1)


@field(shape="[T] bool", padding="False")
def is_token(layout: Tensor, num_tokens: int) -> Tensor:
    """Whether a place of the packed stream holds a token, not padding."""
    return torch.arange(num_tokens, dtype=torch.int32, device=layout.device) < cu_seqlens_q(layout)[-1]


@field(shape="[T] int32", padding="0")
def position_ids(layout: Tensor, num_tokens: int) -> Tensor:
    """c_r + (t - start_r): each token's place in its own sequence."""
    row_T = token_to_seq(layout, num_tokens)
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=layout.device)
    offset_S = layout[:, CONTEXT_LEN] - cu_seqlens_q(layout)[:-1]
    return torch.where(is_token(layout, num_tokens), token_T + offset_S[row_T], 0)


@field(shape="[S, P] int32", depends="G", padding="scratch page 0")
def block_table(layout: Tensor, group: int, num_groups: int) -> Tensor:
    """Each sequence's pages in order, for one KV group."""
    pages = (layout.shape[1] - NUM_FIXED_COLUMNS) // num_groups
    return layout[:, NUM_FIXED_COLUMNS + group * pages : NUM_FIXED_COLUMNS + (group + 1) * pages]


@field(shape="[T] int64", depends="G P", padding="slot 0 of scratch page 0")
def slot_mapping(layout: Tensor, num_tokens: int, group: int, num_groups: int, page_size: int) -> Tensor:
    """table[r, pos // p] * p + pos % p: where each new token is written."""
    position_T = position_ids(layout, num_tokens)
    page_T = block_table(layout, group, num_groups)[token_to_seq(layout, num_tokens), position_T // page_size]
    slot_T = page_T.to(torch.int64) * page_size + position_T % page_size
    return torch.where(is_token(layout, num_tokens), slot_T, 0)


@field(shape="[S] int32", padding="scratch slot 0")
def state_slots(layout: Tensor) -> Tensor:
    """Each sequence's place in the recurrent and convolution state caches."""
    return layout[:, STATE_SLOT]


@field(shape="[S] bool", padding="False")
def has_initial_state(layout: Tensor) -> Tensor:
    """c > 0: whether a sequence goes on from a cached state."""
    return layout[:, CONTEXT_LEN] > 0


@field(shape="[S] int64", padding="the row before the end, at least 0")
def logits_indices(layout: Tensor) -> Tensor:
    """start_{r+1} - 1: the last token of each sequence, whose logits are sampled."""
    return (cu_seqlens_q(layout)[1:] - 1).clamp(min=0).to(torch.int64)


@field(shape="[S + 1] int32", depends="P", padding="the total")
def kv_page_indptr(layout: Tensor, page_size: int) -> Tensor:
    """[0, cumsum ceil(s / p)]: where each sequence's pages start in a concatenated page list."""
    pages_S = (seq_lens(layout) + page_size - 1) // page_size
    return torch.nn.functional.pad(pages_S.cumsum(0, dtype=torch.int32), (1, 0))


@field(shape="[S] int32", depends="P", padding="p (no page in use)")
def last_page_len(layout: Tensor, page_size: int) -> Tensor:
    """(s - 1) % p + 1: tokens in each sequence's last page."""
    return (seq_lens(layout) - 1) % page_size + 1


@field(shape="[S] int32", depends="W", padding="0")
def window_start(layout: Tensor, window: int) -> Tensor:
    """max(0, c + 1 - w): the first cached position that the first new token of each sequence still sees."""
    return (layout[:, CONTEXT_LEN] + 1 - window).clamp(min=0)
