"""The padded sizes of a step.

The step is compiled once for symbolic T, S and P, so rounding is not needed against recompiles, with one exception:
torch.compile turns a size of 0 or 1 into a constant, so no size is ever below 2. T and S are not rounded otherwise:
their cost is linear, and a step of n sequences should not pay for more. P is: every backend reads whole tables, and
a P that grows by one every `page_size` steps would change all memory sizes each time. Its buckets
2, 3, 4, 6, 8, 12, 16, 24, ... waste less than half of what is read.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_SIZE = 2


class StepSizes(NamedTuple):
    """Packed tokens T, layout rows S, block-table entries per sequence P, padding included."""

    num_tokens: int
    num_sequences: int
    pages_per_sequence: int


def padded_sizes(num_tokens: int, num_sequences: int, pages_per_sequence: int, max_pages: int) -> StepSizes:
    """The sizes to pad a step to; `max_pages` (at least 2) bounds the pages of any sequence."""
    pages = min(_page_bucket(pages_per_sequence), max_pages)
    return StepSizes(max(MIN_SIZE, num_tokens), max(MIN_SIZE, num_sequences), pages)


def _page_bucket(pages: int) -> int:
    if pages <= MIN_SIZE:
        return MIN_SIZE
    power = 1 << (pages - 1).bit_length()
    return power * 3 // 4 if pages <= power * 3 // 4 else power
