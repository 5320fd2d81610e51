"""Who owns which page and which state slot.

One pool of pages per KV group, one block table per group and sequence row, all in one array that lives as long as the
engine and is changed only where something changed. Row r of the tables belongs to state slot r + 1 (slot 0 is scratch).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autodeploy.errors import OptionError
from autodeploy.metadata.layout import SCRATCH_PAGE, LayoutSpec
from autodeploy.metadata.span import Span


def pages_needed(num_tokens: int, page_size: int, span: Span) -> int:
    """The most pages that one sequence holds at once while it grows to `num_tokens`, one token per step."""
    pages = -(-num_tokens // page_size)
    # w positions in a row touch at most (w + p - 2) // p + 1 pages, when the first of them is a page's last.
    return pages if span.longest is None else min(pages, (span.longest + page_size - 2) // page_size + 1)


_NO_PAGE = np.array([[SCRATCH_PAGE]])


class Change(NamedTuple):
    """What a decode step changed in the block tables: entries of some of its sequences, in some KV groups.

    `sequences` [k] are places in the batch, `groups` [g, 1], `entries` [k] columns of their tables, and
    `pages` [g or 1, k or 1] what is there now.
    """

    sequences: np.ndarray
    groups: np.ndarray
    entries: np.ndarray
    pages: np.ndarray


class PagePool:
    """The pages of one KV group: 1 .. num_pages - 1, each free or in exactly one row of `table` [N, P] int32.

    Entries of row r before first[r] are behind what its tokens still see, and are 0.
    """

    def __init__(self, table: np.ndarray, num_pages: int) -> None:
        self.table = table
        self.num_pages = num_pages
        self.first = np.zeros(len(table), dtype=np.int64)
        # Taken from the back, so that the lowest and most recently used pages go first.
        self.free = list(range(num_pages - 1, SCRATCH_PAGE, -1))

    def fill(self, row: int, first: int, end: int) -> None:
        """Put free pages into entries first .. end - 1; the caller has checked that there are as many."""
        self.table[row, first:end] = self.take(end - first)

    def take(self, count: int) -> list[int]:
        """`count` free pages, which the caller has checked that there are, the last freed first."""
        taken = self.free[len(self.free) - count :]
        del self.free[len(self.free) - count :]
        return taken[::-1]

    def drop_before(self, row: int, entry: int) -> None:
        """Free the pages of a row before `entry`."""
        first = self.first[row]
        if entry <= first:
            return
        self.free += self.table[row, first:entry].tolist()
        self.table[row, first:entry] = SCRATCH_PAGE
        self.first[row] = entry


class BlockTables:
    """Pages of all KV groups and state slots of up to `max_num_seqs` sequences.

    `tables` [G, N, P] int32 are the block tables, 0 where a row has no page. `num_pages` is per KV group, the scratch
    page included. Raises OptionError where a group is left without pages.
    """

    def __init__(self, spec: LayoutSpec, num_pages: Sequence[int], max_num_seqs: int, max_pages: int) -> None:
        if len(num_pages) != spec.num_groups or any(count < 2 for count in num_pages):
            raise OptionError(
                f"num_pages is {tuple(num_pages)} for {spec.num_groups} KV groups",
                fix="give each group at least 2 pages: scratch and one more",
            )
        self.spec = spec
        self.tables = np.full((spec.num_groups, max_num_seqs, max_pages), SCRATCH_PAGE, dtype=np.int32)
        self.pools = [PagePool(table, count) for table, count in zip(self.tables, num_pages, strict=True)]
        self._groups = np.arange(spec.num_groups)[:, None]
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        # How many entries of each row have been filled, the same in all groups.
        self.ends = np.zeros(max_num_seqs, dtype=np.int64)

    def fits_alone(self, num_tokens: int) -> bool:
        """Whether a sequence can grow to `num_tokens` if it has the pools to itself."""
        return all(
            pages_needed(num_tokens, self.spec.page_size, span) < pool.num_pages
            for pool, span in zip(self.pools, self.spec.spans, strict=True)
        )

    def fits_now(self, num_tokens: int) -> bool:
        """Whether a new sequence could grow to `num_tokens` with what is free."""
        return bool(self.free_rows) and all(
            pages_needed(num_tokens, self.spec.page_size, span) <= len(pool.free)
            for pool, span in zip(self.pools, self.spec.spans, strict=True)
        )

    def acquire(self) -> int:
        """A row, and with it a state slot, that nobody has."""
        return self.free_rows.pop()

    def release(self, row: int) -> None:
        """Free a row, its state slot and all its pages."""
        for pool in self.pools:
            pool.drop_before(row, self.ends[row])
            pool.first[row] = 0
        self.ends[row] = 0
        self.free_rows.append(row)

    def capacity(self, row: int) -> int:
        """How many tokens the row could hold if it took every free page."""
        return self.spec.page_size * (int(self.ends[row]) + self._num_free())

    def _num_free(self) -> int:
        """How many pages every group has; without groups there are no pages to lack."""
        return min([len(pool.free) for pool in self.pools], default=sys.maxsize)

    def extend(self, row: int, num_tokens: int) -> bool:
        """Give the row pages for positions up to `num_tokens`, in every group or, where one lacks them, in none."""
        first, end = int(self.ends[row]), -(-num_tokens // self.spec.page_size)
        if end <= first:
            return True
        if end - first > self._num_free():
            return False
        for pool in self.pools:
            pool.fill(row, first, end)
        self.ends[row] = end
        return True

    def drop_unread(self, row: int, context_len: int) -> None:
        """Free the pages that no token from position `context_len` on will read: those behind a window or a chunk."""
        for group, pool in enumerate(self.pools):
            pool.drop_before(row, self.spec.first_read_page(group, context_len))

    def extend_each(self, rows: np.ndarray, context_lens: np.ndarray) -> list[Change] | None:
        """A page for those of `rows` [n] that have none for their next token, that at position `context_lens` [n].

        None, with nothing changed, where some group lacks pages.
        """
        ends = self.ends.take(rows)
        full = (context_lens == ends * self.spec.page_size).nonzero()[0]
        if not full.size:
            return []
        if full.size > self._num_free():
            return None
        rows, ends = rows[full], ends[full]
        self.ends[rows] = ends + 1
        pages = np.array([pool.take(full.size) for pool in self.pools]).reshape(-1, full.size)
        self.tables[self._groups, rows, ends] = pages
        return [Change(full, self._groups, ends, pages)]

    def drop_each(self, rows: np.ndarray, context_lens: np.ndarray) -> list[Change]:
        """As `drop_unread` for each of `rows` [n]: a window leaves a page now and then, a chunk all of its pages."""
        changes = []
        for group, (pool, span) in enumerate(zip(self.pools, self.spec.spans, strict=True)):
            if span.longest is None:
                continue
            first, now = pool.first.take(rows), self.spec.first_read_page(group, context_lens)
            behind = (now > first).nonzero()[0]
            if behind.size:
                sequences, entries = _ranges(behind, first[behind], now[behind])
                dropped = rows[sequences]
                pool.free += pool.table[dropped, entries].tolist()
                pool.table[dropped, entries] = SCRATCH_PAGE
                pool.first[rows[behind]] = now[behind]
                changes.append(Change(sequences, self._groups[group : group + 1], entries, _NO_PAGE))
        return changes


def _ranges(names: np.ndarray, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each of `names` [n] once for every number from its `first` on to its `end`, and these numbers."""
    counts = end - first
    start = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(names, counts), np.arange(len(start)) - start + np.repeat(first, counts)
