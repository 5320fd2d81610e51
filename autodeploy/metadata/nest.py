"""`nest_sequences`: one step's ragged batch, packed for one host-to-device copy.

    buffer = [ token ids (T) | gap to the next 16 bytes | layout rows (S * C) ]        int32, see layout.py

Everything is checked before anything is written, and nothing loops over tokens or pages in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from autodeploy.errors import LayoutError
from autodeploy.metadata.layout import (
    CONTEXT_LEN,
    NUM_FIXED_COLUMNS,
    NUM_LOGITS,
    QUERY_LEN,
    SCRATCH_PAGE,
    SCRATCH_STATE,
    STATE_SLOT,
    LayoutSpec,
)

# Inductor clones an input whose address is not a multiple of 16 bytes, so the layout starts at one: 4 int32.
_ALIGNMENT = 4


def _layout_start(num_tokens: int) -> int:
    return -(-num_tokens // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Arena:
    """Host memory for one step: `buffer` is a contiguous CPU tensor [N] int32, written by `nest_sequences`."""

    buffer: Tensor

    def __post_init__(self) -> None:
        buffer = self.buffer
        if buffer.dtype is torch.int32 and buffer.device.type == "cpu" and buffer.dim() == 1 and buffer.is_contiguous():
            return
        raise LayoutError(
            f"an arena of dtype {buffer.dtype}, shape {tuple(buffer.shape)} on {buffer.device}",
            fix="give a contiguous 1-D int32 tensor on the CPU, or use Arena.allocate",
        )

    @staticmethod
    def allocate(num_tokens: int, num_sequences: int, num_columns: int, *, pinned: bool = False) -> Arena:
        """An arena for up to `num_tokens` tokens and `num_sequences` layout rows of `num_columns`, padding included.

        `pinned` memory can be copied to a GPU while the host goes on.
        """
        size = _layout_start(num_tokens) + num_sequences * num_columns
        return Arena(torch.zeros(size, dtype=torch.int32, pin_memory=pinned))

    def view(self, num_tokens: int, num_sequences: int, num_columns: int) -> Nested:
        """The part of the arena that a step of these sizes takes, as it is. Raises LayoutError if that is too much."""
        size = _layout_start(num_tokens) + num_sequences * num_columns
        if size > self.buffer.numel():
            raise LayoutError(
                f"{num_tokens} tokens and {num_sequences} rows of {num_columns} need {size} int32, "
                f"the arena has {self.buffer.numel()}",
                fix="schedule less in one step, or allocate a larger arena",
            )
        return Nested(self.buffer[:size], num_tokens, num_columns)


@dataclass(frozen=True)
class Nested:
    """One packed step. `buffer` [N] int32 is a view of the arena, valid until the arena is written again."""

    buffer: Tensor
    num_tokens: int
    num_columns: int

    @cached_property
    def input_ids(self) -> Tensor:
        """[T] int32, a view."""
        return self.buffer[: self.num_tokens]

    @cached_property
    def layout(self) -> Tensor:
        """[S, C] int32, a view."""
        return self.buffer[_layout_start(self.num_tokens) :].view(-1, self.num_columns)

    def to(self, device: torch.device) -> Nested:
        """The same step in new memory on `device`, by one copy."""
        return replace(self, buffer=self.buffer.to(device, copy=True))


def nest_sequences(
    token_ids: ArrayLike,
    query_lens: ArrayLike,
    context_lens: ArrayLike,
    block_tables: ArrayLike,
    state_slots: ArrayLike,
    spec: LayoutSpec,
    *,
    num_pages: Sequence[int],
    num_state_slots: int,
    num_logits: ArrayLike | None = None,
    arena: Arena | None = None,
    pad_tokens: int = 0,
    pad_sequences: int = 0,
    pages_per_sequence: int | None = None,
) -> Nested:
    """Pack n sequences, in the order given, into `arena` (a new one if None).

    token_ids [sum of query_lens], the new tokens of all sequences, end to end; query_lens, context_lens, state_slots
    [n]; block_tables [G, n, W]; all integers. `num_pages` has the pool size of each KV group and `num_state_slots` that
    of the state caches, scratch included; without state caches `state_slots` may be all 0 (scratch).
    `num_logits` [n] says of how many of its last new tokens each sequence wants logits, by default 1. The step's logits
    [S, V] are those, one sequence after another, and then padding; S is padded to their number at least.
    T and S are padded with zeros up to `pad_tokens` and `pad_sequences`; each block table is cut or padded to
    `pages_per_sequence` (default W).
    Entries of a block table that this step does not use, those behind a sliding window among them, are packed as 0.
    Raises LayoutError, with nothing written, for a batch that would read or write what it does not own.
    """
    if num_logits is None:
        num_logits = np.ones(len(np.asarray(query_lens)), dtype=np.int64)
    batch = _as_batch(token_ids, query_lens, context_lens, block_tables, state_slots, num_logits, spec.num_groups)
    width = batch.block_tables.shape[2] if pages_per_sequence is None else pages_per_sequence
    tables_GSP = batch.block_tables[:, :, :width]
    _check_lengths(batch, tables_GSP.shape[2], spec)
    _check_tokens(batch)
    _check_state_slots(batch.state_slots, num_state_slots, spec)
    tables = [_pages_in_use(tables_GSP[g], batch, g, spec, num_pages[g]) for g in range(spec.num_groups)]

    padded_sequences = max(pad_sequences, len(batch.query_lens), int(batch.num_logits.sum()))
    padded_tokens = max(pad_tokens, len(batch.token_ids))
    num_columns = spec.num_columns(width)
    arena = arena or Arena.allocate(padded_tokens, padded_sequences, num_columns)
    nested = arena.view(padded_tokens, padded_sequences, num_columns)
    columns = (batch.query_lens, batch.context_lens, batch.state_slots, batch.num_logits)
    write_step(nested, batch.token_ids, *columns, tables)
    return nested


class _Batch(NamedTuple):
    token_ids: np.ndarray
    query_lens: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    state_slots: np.ndarray
    num_logits: np.ndarray


def _as_batch(
    token_ids: ArrayLike,
    query_lens: ArrayLike,
    context_lens: ArrayLike,
    block_tables: ArrayLike,
    state_slots: ArrayLike,
    num_logits: ArrayLike,
    num_groups: int,
) -> _Batch:
    batch = _Batch(*map(np.asarray, (token_ids, query_lens, context_lens, block_tables, state_slots, num_logits)))
    num_sequences = len(batch.query_lens)
    sizes = {
        "context_lens": (num_sequences,),
        "state_slots": (num_sequences,),
        "num_logits": (num_sequences,),
        "block_tables": (num_groups, num_sequences),
    }
    for name, array in zip(batch._fields, batch, strict=True):
        if array.ndim != (3 if name == "block_tables" else 1) or (array.size and array.dtype.kind != "i"):
            raise LayoutError(
                f"{name} is {array.dtype} with {array.ndim} dimensions",
                fix="give signed integers, with 3 dimensions for block_tables and 1 for the rest",
            )
        if name in sizes and array.shape[: len(sizes[name])] != sizes[name]:
            raise LayoutError(f"{name} has shape {array.shape} for {num_sequences} sequences")
    # Sums of lengths are compared with capacities below, and may not wrap around before that.
    return batch._replace(
        query_lens=batch.query_lens.astype(np.int64),
        context_lens=batch.context_lens.astype(np.int64),
        state_slots=batch.state_slots.astype(np.int64),
        num_logits=batch.num_logits.astype(np.int64),
    )


def write_step(
    nested: Nested,
    token_ids: np.ndarray,
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    state_slots: np.ndarray,
    num_logits: np.ndarray,
    tables: Sequence[np.ndarray],
) -> None:
    """Fill `nested`, which lies on the CPU, with n sequences as `nest_sequences` takes them, and zeros.

    `tables` [n, P] per KV group hold 0 wherever this step neither reads nor writes. Nothing is checked.
    """
    packed = nested.buffer.numpy()
    packed.fill(0)
    packed[: len(token_ids)] = token_ids
    rows = nested.layout.numpy()[: len(query_lens)]
    rows[:, QUERY_LEN] = query_lens
    rows[:, CONTEXT_LEN] = context_lens
    rows[:, STATE_SLOT] = state_slots
    rows[:, NUM_LOGITS] = num_logits
    width = (nested.num_columns - NUM_FIXED_COLUMNS) // max(1, len(tables))
    for group, table_SP in enumerate(tables):
        first = NUM_FIXED_COLUMNS + group * width
        rows[:, first : first + table_SP.shape[1]] = table_SP


def _refuse(what: str, sequence: int, fix: str = "", group: int | None = None) -> NoReturn:
    where = f"sequence {sequence}" if group is None else f"sequence {sequence}, KV group {group}"
    raise LayoutError(what, where=where, fix=fix)


def _check_lengths(batch: _Batch, table_width: int, spec: LayoutSpec) -> None:
    query_lens, context_lens = batch.query_lens, batch.context_lens
    if (bad := query_lens < 1).any():
        row = int(bad.argmax())
        _refuse(f"query_len is {query_lens[row]}", row, "a sequence of a step has at least one new token; leave it out")
    if (bad := context_lens < 0).any():
        row = int(bad.argmax())
        _refuse(f"context_len is {context_lens[row]}", row)
    if query_lens.sum() != len(batch.token_ids):
        raise LayoutError(f"query_lens add up to {query_lens.sum()}, but there are {len(batch.token_ids)} token ids")
    if (bad := (batch.num_logits < 0) | (batch.num_logits > query_lens)).any():
        row = int(bad.argmax())
        _refuse(f"num_logits is {batch.num_logits[row]} for {query_lens[row]} new tokens", row)
    if not spec.num_groups:
        return
    capacity = table_width * spec.page_size
    if (bad := query_lens + context_lens > capacity).any():
        row = int(bad.argmax())
        _refuse(
            f"{context_lens[row]} cached and {query_lens[row]} new tokens, but its block table holds {capacity}",
            row,
            "pass wider block tables or a larger pages_per_sequence",
        )


def _check_tokens(batch: _Batch) -> None:
    if batch.token_ids.min(initial=0) < 0:
        place = int(batch.token_ids.argmin())
        row = int(np.searchsorted(batch.query_lens.cumsum(), place, side="right"))
        _refuse(f"token id {batch.token_ids[place]} is negative", row)


def _check_state_slots(state_slots: np.ndarray, num_state_slots: int, spec: LayoutSpec) -> None:
    lowest = SCRATCH_STATE + 1 if spec.has_state else SCRATCH_STATE
    if (bad := (state_slots < lowest) | (state_slots >= num_state_slots)).any():
        row = int(bad.argmax())
        _refuse(f"state slot {state_slots[row]} is outside {lowest}..{num_state_slots - 1}", row)
    counts = np.bincount(state_slots)
    counts[:1] = 0
    if (bad := counts[state_slots] > 1).any():
        row = int(bad.argmax())
        _refuse(f"state slot {state_slots[row]} is shared with another sequence", row, "give each sequence its own")


def _pages_in_use(table_SP: np.ndarray, batch: _Batch, group: int, spec: LayoutSpec, num_pages: int) -> np.ndarray:
    """The table [S, P] with 0 where this step neither reads nor writes, once its pages are checked."""
    entry_P = np.arange(table_SP.shape[1])
    used_SP = entry_P < -(-(batch.context_lens + batch.query_lens) // spec.page_size)[:, None]
    if spec.spans[group].longest is not None:
        used_SP &= entry_P >= spec.first_read_page(group, batch.context_lens)[:, None]
    pages_SP = np.where(used_SP, table_SP, SCRATCH_PAGE)
    in_range = pages_SP.min(initial=0) >= 0 and pages_SP.max(initial=0) < num_pages
    if not in_range or np.count_nonzero(pages_SP) < np.count_nonzero(used_SP):
        bad_SP = used_SP & ((pages_SP <= SCRATCH_PAGE) | (pages_SP >= num_pages))
        row, entry = np.unravel_index(bad_SP.argmax(), bad_SP.shape)
        what = f"entry {entry} of its block table is page {table_SP[row, entry]}, outside 1..{num_pages - 1}"
        _refuse(what, int(row), "page 0 is scratch and owned by nobody", group)

    # A page may be shared as long as nobody writes it (a common prefix), so only written pages must have one owner.
    counts = np.bincount(pages_SP.ravel(), minlength=1)
    counts[SCRATCH_PAGE] = 0
    written_SP = used_SP & (entry_P >= (batch.context_lens // spec.page_size)[:, None])
    if (counts[pages_SP[written_SP]] > 1).any():
        shared_SP = written_SP & (counts[pages_SP] > 1)
        row, entry = np.unravel_index(shared_SP.argmax(), shared_SP.shape)
        page = pages_SP[row, entry]
        owners = sorted(set(np.nonzero(pages_SP == page)[0].tolist()))
        what = f"page {page} will be written, but is in use more than once, by sequences {owners}"
        _refuse(what, int(row), "give each sequence pages of its own from the first new token on", group)
    return pages_SP
