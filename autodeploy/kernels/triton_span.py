"""What a token sees, in Triton: the formulas of `metadata/span.py` by a span's code."""

# Triton's language has types of its own.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_seen(position, SPAN: tl.constexpr):
    """The first position that a token at `position` (at least 0) sees, at least 0."""
    if SPAN > 0:
        first = tl.maximum(position + 1 - SPAN, 0)
    elif SPAN < 0:
        first = position // (-SPAN) * (-SPAN)
    else:
        first = position * 0
    return first
