"""What a token sees, pair by pair: what the formulas of spans are held against."""

from __future__ import annotations

from autodeploy.metadata.span import Chunk, Full, Span, Window

FULL = Full()
SPANS = [FULL, Window(1), Window(3), Window(6), Chunk(1), Chunk(3), Chunk(8)]


def sees(span: Span, query: int, key: int) -> bool:
    """Whether the token at `query` sees that at `key`, not after it."""
    if isinstance(span, Window):
        return query - key < span.size
    return not isinstance(span, Chunk) or query // span.size == key // span.size


def first(span: Span, query: int) -> int:
    """The first position that a token at `query` sees."""
    return next(key for key in range(query + 1) if sees(span, query, key))
