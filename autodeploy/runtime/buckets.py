"""The padded sizes of a step.

The step is compiled once for symbolic T, S and P, so rounding is not needed against recompiles, with one exception:
torch.compile turns a size of 0 or 1 into a constant, so no size is ever below 2. T and S are not rounded otherwise:
their cost is linear, and a step of n sequences should not pay for more. P is: every backend reads whole tables, and
a P that grows by one every `page_size` steps would change all memory sizes each time. Its buckets
2, 3, 4, 6, 8, 12, 16, 24, ... waste less than half of what is read.

A decode step that is captured as a CUDA graph is captured once per sizes, so these are coarser: S is 2, 4 or a
multiple of 8, and P a power of two from 64 on. A smaller P would save nothing: 64 pages of each of 64 sequences are
16 KiB, which take less time to copy than the copy takes to start. Always the largest would do with fewer captures, but
send 128 KiB for 64 sequences of at most 512 pages, and hide from those who launch kernels, which see no lengths, how
the work is to be split.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

MIN_SIZE = 2
_CAPTURED_ROWS = 8
_CAPTURED_PAGES = 64


class StepSizes(NamedTuple):
    """Packed tokens T, layout rows S, block-table entries per sequence P, padding included."""

    num_tokens: int
    num_sequences: int
    pages_per_sequence: int


@lru_cache(maxsize=64)
def padded_sizes(num_tokens: int, num_sequences: int, pages_per_sequence: int, max_pages: int) -> StepSizes:
    """The sizes to pad a step to. `max_pages` (at least 2) bounds the pages of any sequence."""
    pages = min(_page_bucket(pages_per_sequence), max_pages)
    return StepSizes(max(MIN_SIZE, num_tokens), max(MIN_SIZE, num_sequences), pages)


@lru_cache(maxsize=64)
def captured_sizes(num_sequences: int, pages_per_sequence: int, max_num_seqs: int, max_pages: int) -> StepSizes:
    """The sizes to pad a decode step of `num_sequences` to for a CUDA graph; `max_num_seqs` bounds them."""
    rows = -(-num_sequences // _CAPTURED_ROWS) * _CAPTURED_ROWS
    if num_sequences <= _CAPTURED_ROWS // 2:
        rows = 4 if num_sequences > MIN_SIZE else MIN_SIZE
    rows = max(MIN_SIZE, min(rows, max_num_seqs))
    pages = max(_CAPTURED_PAGES, 1 << (pages_per_sequence - 1).bit_length())
    return StepSizes(rows, rows, min(pages, max_pages))


def _page_bucket(pages: int) -> int:
    if pages <= MIN_SIZE:
        return MIN_SIZE
    power = 1 << (pages - 1).bit_length()
    return power * 3 // 4 if pages <= power * 3 // 4 else power
