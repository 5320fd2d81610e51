"""The arena of fields that one launch fills: what lies where in it, the op that fills it, and views of it by name.

Shapes: S sequences, T packed tokens (padding included), P pages per sequence, G KV groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autodeploy.kernels.support import power_of_two
from autodeploy.kernels.triton_fields import fields_kernel, num_places, num_programs, slot_words
from autodeploy.metadata.field import FieldLauncher, FieldRequest
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS
from autodeploy.metadata.span import span_of

# Tokens above which a step is long beside this launch, so that programs may take more places and fewer rows at once.
_MANY_TOKENS = 4096
_FEWEST_ROWS, _MOST_ROWS = 64, 1024
_PAGE_BLOCK = 256
# Older versions of Inductor cannot view memory as booleans: such fields are then left to it.
_VIEWS_BOOLEANS = torch.__version__ >= "2.13"


class _Known(NamedTuple):
    """Which places a field has values for, and whether there is one field for each KV group."""

    axis: str
    dtype: torch.dtype = torch.int32
    is_grouped: bool = False


_KNOWN = {
    "cu_seqlens_q": _Known("row"),
    "seq_lens": _Known("row"),
    "has_initial_state": _Known("row", dtype=torch.bool),
    "kv_page_indptr": _Known("row"),
    "seen_page_indptr": _Known("row"),
    "last_page_len": _Known("row"),
    "first_seen": _Known("row"),
    "kv_page_indices": _Known("page", is_grouped=True),
    "seen_page_indices": _Known("page", is_grouped=True),
    "query_tiles": _Known("tile"),
    "logits_indices": _Known("logit", dtype=torch.int64),
    "token_to_seq": _Known("token"),
    "is_token": _Known("token", dtype=torch.bool),
    "position_ids": _Known("token"),
    "slot_mapping": _Known("token", dtype=torch.int64, is_grouped=True),
}
_STARTS = ("cu_seqlens_q", "kv_page_indptr", "seen_page_indptr")  # with one more entry than there are rows

# A plan is made of sections (axis, parameters, slots), a slot is (name, copies, parameters): plain tuples, which a
# kernel takes as a constexpr. What is grouped has G copies, and the parameters G, power of 2 from G on, page size, ...
_Slot = tuple[str, int, tuple[int, ...]]
_Plan = tuple[tuple[str, tuple[int, ...], tuple[_Slot, ...]], ...]
_Sizes = tuple[Any, Any, Any]  # S, T and G * P: numbers, symbols or proxies


@cache
def make_plan(requests: tuple[FieldRequest, ...]) -> Any:
    """What the kernel is compiled for: see _Plan."""
    sections: dict[tuple[str, tuple[int, ...]], dict[_Slot, None]] = {}
    # In the order in which programs start: those that have most to do first.
    for request in sorted(requests, key=lambda request: list(_KNOWN).index(request.name)):
        axis, slot = _KNOWN[request.name].axis, _slot(request)
        section = (axis, slot[2] if axis in ("page", "tile") else ())
        sections.setdefault(section, {})[slot] = None
    return tuple((*section, tuple(slots)) for section, slots in sections.items())


def _slot(request: FieldRequest) -> _Slot:
    name, parameters = request
    if name in ("kv_page_indptr", "kv_page_indices"):  # what is seen where all is
        name, parameters = name.replace("kv", "seen"), (*parameters, "full")
    numbers = tuple(span_of(each).code if isinstance(each, str) else each for each in parameters)
    if not _KNOWN[name].is_grouped:
        return name, 1, numbers
    _, num_groups, *rest = numbers
    return name, num_groups, (num_groups, power_of_two(num_groups), *rest)


def _begins(plan: _Plan, sizes: _Sizes) -> tuple[dict[tuple[_Slot, int], Any], Any]:
    """The first word of each copy of each slot, and the number of words of the arena."""
    begins, end = {}, 0
    for axis, parameters, slots in plan:
        words = slot_words.fn(axis, num_places.fn(axis, parameters, *sizes))
        for key in ((slot, copy) for slot in slots for copy in range(slot[1])):
            begins[key] = end
            end += words
    return begins, end


def _sizes(layout: Tensor, num_tokens: int) -> _Sizes:
    return layout.shape[0], num_tokens, layout.shape[1] - NUM_FIXED_COLUMNS


# As text, because an op takes no tuples of names and numbers: "slot_mapping:0:2:16 seq_lens".
def _to_text(requests: Sequence[FieldRequest]) -> str:
    return " ".join(":".join([name, *map(str, parameters)]) for name, parameters in requests)


@cache
def _from_text(text: str) -> tuple[FieldRequest, ...]:
    return tuple(
        FieldRequest(name, tuple(map(_parameter, rest))) for name, *rest in (each.split(":") for each in text.split())
    )


def _parameter(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "launch_fields(Tensor layout, SymInt num_tokens, str requests) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.register_fake("autodeploy::launch_fields", lib=_library)
def _empty_arena(layout: Tensor, num_tokens: int, requests: str) -> Tensor:
    _, end = _begins(make_plan(_from_text(requests)), _sizes(layout, num_tokens))
    return torch.empty(end, dtype=torch.int32, device=layout.device)


@torch.library.impl(_library, "launch_fields", "CompositeExplicitAutograd")
def _launch(layout: Tensor, num_tokens: int, requests: str) -> Tensor:
    """All fields asked for, written as `_to_text` writes them, in one arena [words] int32."""
    assert layout.dtype is torch.int32
    assert layout.stride(1) == 1
    arena = _empty_arena(layout, num_tokens, requests)
    plan, sizes = make_plan(_from_text(requests)), _sizes(layout, num_tokens)
    blocks = choose_blocks(layout.shape[0], num_tokens)
    grid = 0
    for axis, parameters, _ in plan:
        places = num_places.fn(axis, parameters, *sizes)
        grid += num_programs.fn(axis, places, layout.shape[0], blocks["N"], blocks["ROW_BLOCK"])
    fields_kernel[(grid,)](layout, arena, *sizes, layout.stride(0), plan, **blocks)
    return arena


def choose_blocks(num_rows: int, num_tokens: int) -> dict[str, Any]:
    """The kernel's block sizes: powers of 2, few different ones, because each is compiled."""
    row_block = min(max(power_of_two(num_rows), _FEWEST_ROWS), _MOST_ROWS)
    N, R = (8, row_block) if num_tokens <= _MANY_TOKENS else (64, min(row_block, 128))
    return {"N": N, "R": R, "ROW_BLOCK": row_block, "PAGE_BLOCK": _PAGE_BLOCK}


class TritonFields(FieldLauncher):
    """Launches `fields_kernel`; the fields are views of its arena."""

    def supports(self, request: FieldRequest) -> bool:
        return request.name in _KNOWN and (_VIEWS_BOOLEANS or _KNOWN[request.name].dtype is not torch.bool)

    def launch(self, layout: Tensor, num_tokens: int, requests: Sequence[FieldRequest]) -> list[Tensor]:
        arena = torch.ops.autodeploy.launch_fields.default(layout, num_tokens, _to_text(requests))
        sizes = _sizes(layout, num_tokens)
        begins, _ = _begins(make_plan(tuple(requests)), sizes)
        return [_view(arena, request, begins, sizes) for request in requests]


def _view(arena: Tensor, request: FieldRequest, begins: dict[tuple[_Slot, int], Any], sizes: _Sizes) -> Tensor:
    known, slot = _KNOWN[request.name], _slot(request)
    begin = begins[slot, int(request.parameters[0]) if known.is_grouped else 0]
    is_per_row = known.axis == "row" and request.name not in _STARTS
    length = sizes[0] if is_per_row else num_places.fn(known.axis, slot[2], *sizes)
    if known.axis == "tile":
        return arena[begin : begin + 2 * length].view(-1, 2)
    if known.dtype is torch.int64:
        return arena[begin : begin + 2 * length].view(torch.int64)
    if known.dtype is torch.bool:
        return arena[begin : begin + (length + 3) // 4].view(torch.bool)[:length]
    return arena[begin : begin + length]


LAUNCHER = TritonFields()
