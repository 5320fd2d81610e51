"""Random ragged batches: rows of (query_len, context_len, state slot, pages per group) and the layout they make."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One sequence of a batch; `tables[g]` are the pages it owns in KV group g."""

    query_len: int
    context_len: int
    state_slot: int
    tables: tuple[tuple[int, ...], ...]
    num_logits: int = 0

    @property
    def seq_len(self) -> int:
        return self.context_len + self.query_len


@dataclass(frozen=True)
class Batch:
    """Rows, padding rows included, and the sizes that the fields are asked for."""

    rows: tuple[Row, ...]
    page_size: int
    num_groups: int
    num_pages: int
    num_tokens: int
    pages_per_sequence: int

    @property
    def total(self) -> int:
        return sum(row.query_len for row in self.rows)

    def layout(self) -> Tensor:
        rows = []
        for row in self.rows:
            tables = [[*table, *[0] * (self.pages_per_sequence - len(table))] for table in row.tables]
            pages = [page for table in tables for page in table]
            rows.append([row.query_len, row.context_len, row.state_slot, row.num_logits, *pages])
        return torch.tensor(rows, dtype=torch.int32)


def make_batch(
    lengths: list[tuple[int, int]],
    *,
    page_size: int = 4,
    num_groups: int = 1,
    padding_rows: int = 0,
    padding_tokens: int = 0,
    spare_pages: int = 0,
    seed: int = 0,
    num_logits: list[int] | None = None,
) -> Batch:
    """A batch of (query_len, context_len), with shuffled pages that no two rows share.

    `num_logits` is by default 1 of each row with tokens; padding rows are added for more.
    """
    wanted = [min(1, query) for query, _ in lengths] if num_logits is None else num_logits
    padding_rows = max(padding_rows, sum(wanted) - len(lengths))
    shuffled = random.Random(seed)
    counts = [-(-(query + context) // page_size) for query, context in lengths]
    num_pages = 1 + sum(counts) + 2
    slots = shuffled.sample(range(1, len(lengths) + 2), len(lengths))
    pools = [shuffled.sample(range(1, num_pages), num_pages - 1) for _ in range(num_groups)]
    rows = []
    for (query, context), count, slot, logits in zip(lengths, counts, slots, wanted, strict=True):
        tables = tuple(tuple(pool.pop() for _ in range(count)) for pool in pools)
        rows.append(Row(query, context, slot, tables, logits))
    rows += [Row(0, 0, 0, ((),) * num_groups)] * padding_rows
    return Batch(
        rows=tuple(rows),
        page_size=page_size,
        num_groups=num_groups,
        num_pages=num_pages,
        num_tokens=max(1, sum(query for query, _ in lengths) + padding_tokens),
        pages_per_sequence=max([*counts, 1]) + spare_pages,
    )
