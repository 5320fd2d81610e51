"""Pages and rows: after anything that can happen, each page has exactly one owner or is free."""

from __future__ import annotations

import numpy as np
import pytest
import spans
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spans import FULL, SPANS

from autodeploy.errors import OptionError
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.metadata.span import Chunk, Span, Window
from autodeploy.runtime.pages import BlockTables, pages_needed

MAX_NUM_SEQS, MAX_PAGES = 4, 8


def check_ownership(tables: BlockTables, held: dict[int, tuple[int, int]]) -> None:
    """`held`: row -> (tokens computed, tokens with pages)."""
    assert sorted([*tables.free_rows, *held]) == list(range(MAX_NUM_SEQS))
    for pool, span in zip(tables.pools, tables.spec.spans, strict=True):
        owned = pool.table[pool.table > 0].tolist()
        assert sorted(owned + pool.free) == list(range(1, pool.num_pages)), "a page is lost or owned twice"
        for row in range(MAX_NUM_SEQS):
            computed, covered = held.get(row, (0, 0))
            first = spans.first(span, computed) // tables.spec.page_size
            entries = np.nonzero(pool.table[row])[0].tolist()
            assert entries == list(range(first, -(-covered // tables.spec.page_size)))


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.sampled_from(SPANS), max_size=3),
    st.lists(st.tuples(st.sampled_from(["acquire", "extend", "commit", "release"]), st.integers(0, 99)), max_size=60),
    st.data(),
)
def test_no_page_is_owned_twice_and_none_leaks(
    page_size: int, of_groups: list, moves: list, data: st.DataObject
) -> None:
    num_pages = [data.draw(st.integers(2, 20)) for _ in of_groups]
    tables = BlockTables(LayoutSpec(page_size, tuple(of_groups)), num_pages, MAX_NUM_SEQS, MAX_PAGES)
    held: dict[int, tuple[int, int]] = {}
    for move, number in moves:
        row = list(held)[number % len(held)] if held else None
        if move == "acquire" and tables.free_rows:
            held[tables.acquire()] = (0, 0)
        elif move == "extend" and row is not None:
            computed, covered = held[row]
            wanted = number % (MAX_PAGES * page_size + 1)
            possible = wanted <= max(covered, tables.capacity(row))
            assert tables.extend(row, wanted) == possible
            held[row] = (computed, max(covered, wanted) if possible else covered)
        elif move == "commit" and row is not None:
            held[row] = (held[row][1], held[row][1])
            tables.drop_unread(row, held[row][0])
        elif move == "release" and row is not None:
            tables.release(row)
            del held[row]
        check_ownership(tables, held)


@given(
    st.integers(1, 3),
    st.lists(st.sampled_from(SPANS), max_size=3),
    st.lists(st.integers(1, 6), min_size=1, max_size=MAX_NUM_SEQS),
    st.integers(7, 25),
)
def test_decode_steps_change_what_they_say_or_nothing(
    page_size: int, of_groups: list, lengths: list[int], num_pages: int
) -> None:
    tables = BlockTables(LayoutSpec(page_size, tuple(of_groups)), [num_pages] * len(of_groups), MAX_NUM_SEQS, 12)
    rows, computed = np.array([tables.acquire() for _ in lengths]), np.array(lengths)
    for row, length in zip(rows.tolist(), lengths, strict=True):
        assume(tables.extend(row, length))
        tables.drop_unread(row, length)
    for _ in range(6):
        expected, num_full = tables.tables.copy(), np.count_nonzero(tables.ends[rows] * page_size == computed)
        is_lacking = any(len(pool.free) < num_full for pool in tables.pools)
        changes = tables.extend_each(rows, computed)
        assert (changes is None) == is_lacking
        if changes is not None:
            computed = computed + 1
            changes += tables.drop_each(rows, computed)
        for change in changes or []:
            expected[change.groups, rows[change.sequences], change.entries] = change.pages
        assert np.array_equal(tables.tables, expected)
        check_ownership(tables, {row: (count, count) for row, count in zip(rows.tolist(), computed, strict=True)})


@given(st.integers(1, 5), st.sampled_from([Window, Chunk]), st.integers(1, 12), st.integers(1, 30))
def test_pages_needed_is_what_growing_token_by_token_holds_at_most(
    page_size: int, sort: type[Span], size: int, length: int
) -> None:
    tables = BlockTables(LayoutSpec(page_size, (sort(size),)), [40], 1, 40)
    row, most = tables.acquire(), 0
    for computed in range(length):
        assert tables.extend(row, computed + 1)
        most = max(most, np.count_nonzero(tables.tables))
        tables.drop_unread(row, computed + 1)
    bound = pages_needed(length, page_size, sort(size))
    assert most <= bound
    is_settled = sort is Window and length >= size + page_size
    assert most == bound or not is_settled, "the bound is exact once the window has passed a whole page"


def test_extend_takes_nothing_where_one_group_lacks_pages() -> None:
    tables = BlockTables(LayoutSpec(4, (FULL, FULL)), [9, 3], 2, 8)
    row = tables.acquire()
    assert not tables.extend(row, 12)
    assert not tables.tables.any()
    assert tables.capacity(row) == 8
    assert tables.extend(row, 8)


def test_the_lowest_pages_go_first_and_in_order() -> None:
    tables = BlockTables(LayoutSpec(4, (FULL,)), [9], 2, 8)
    tables.extend(tables.acquire(), 12)
    assert tables.tables[0, 0].tolist() == [1, 2, 3, 0, 0, 0, 0, 0]


def test_without_groups_there_are_no_pages_to_lack() -> None:
    tables = BlockTables(LayoutSpec(1, ()), [], 5, 2)
    rows = np.array([tables.acquire() for _ in range(5)])
    assert all(tables.extend(row, 2) for row in rows)
    assert tables.extend_each(rows, np.full(5, 2)) is not None


@pytest.mark.parametrize("num_pages", [[1], [9, 9], []])
def test_a_group_without_pages_is_refused(num_pages: list[int]) -> None:
    with pytest.raises(OptionError, match=r"num_pages is \(.*\) for 1 KV groups"):
        BlockTables(LayoutSpec(4, (FULL,)), num_pages, 2, 8)
