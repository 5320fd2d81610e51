"""`nest_sequences` and the fields derived from what it packs, against loops that say the same one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import spans
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spans import FULL, SPANS

from autodeploy.errors import LayoutError
from autodeploy.kernels.registry import field_named
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS, LayoutSpec
from autodeploy.metadata.nest import Arena, nest_sequences
from autodeploy.metadata.span import Window

SPEC = LayoutSpec(page_size=4, spans=(FULL, Window(6)), has_state=True)


@st.composite
def batches(draw: st.DrawFn) -> tuple[LayoutSpec, dict]:
    """A valid ragged batch: pages dealt from a shuffled deck, those behind a window freed or kept at random."""
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    of_groups = tuple(draw(st.lists(st.sampled_from(SPANS), max_size=3)))
    spec = LayoutSpec(page_size, of_groups, draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    query = np.array(draw(st.lists(st.integers(1, 9), max_size=6)), dtype=np.int32)
    context = np.array([draw(st.integers(0, 20)) for _ in query], dtype=np.int32)
    used = -(-(query + context) // page_size)
    width = int(used.max(initial=1)) + draw(st.integers(0, 2))
    num_pages = int(used.sum()) + 2
    tables = np.full((len(of_groups), len(query), width), -7, dtype=np.int32)
    for group, span in enumerate(of_groups):
        deck = rng.permutation(np.arange(1, num_pages)).tolist()
        for row, count in enumerate(used):
            tables[group, row, :count] = [deck.pop() for _ in range(count)]
            dead = spans.first(span, int(context[row])) // page_size
            tables[group, row, : dead * draw(st.booleans())] = 0
    batch = {
        "token_ids": rng.integers(1, 100, query.sum()).astype(np.int32),
        "query_lens": query,
        "context_lens": context,
        "block_tables": tables,
        "state_slots": rng.permutation(np.arange(1, len(query) + 1)).astype(np.int32),
        "num_pages": (num_pages,) * len(of_groups),
        "num_state_slots": len(query) + 1,
        "num_logits": None if draw(st.booleans()) else [draw(st.integers(0, int(new))) for new in query],
        "pages_per_sequence": width + draw(st.integers(0, 2)),
        "pad_tokens": draw(st.integers(0, 70)),
        "pad_sequences": draw(st.integers(1, 8)),
    }
    return spec, batch


def naive_fields(spec: LayoutSpec, batch: dict) -> dict[str, list]:
    """Every field the hard way; padding as the catalogue says."""
    query, context = batch["query_lens"].tolist(), batch["context_lens"].tolist()
    logits = [1] * len(query) if batch["num_logits"] is None else batch["num_logits"]
    num_sequences = max(len(query), batch["pad_sequences"], sum(logits))
    num_tokens = max(sum(query), batch["pad_tokens"])
    starts, positions, rows = [0], [], []
    for row, (new, cached) in enumerate(zip(query, context, strict=True)):
        positions += range(cached, cached + new)
        rows += [row] * new
        starts.append(starts[-1] + new)
    slots = {group: [] for group in range(spec.num_groups)}
    for group in slots:
        for row, position in zip(rows, positions, strict=True):
            page = int(batch["block_tables"][group, row, position // spec.page_size])
            slots[group].append(page * spec.page_size + position % spec.page_size)
    pad_rows, pad_tokens = num_sequences - len(query), num_tokens - len(rows)
    expected = {
        "cu_seqlens_q": starts + [starts[-1]] * pad_rows,
        "position_ids": positions + [0] * pad_tokens,
        "seq_lens": [q + c for q, c in zip(query, context, strict=True)] + [0] * pad_rows,
        "is_token": [True] * len(rows) + [False] * pad_tokens,
        "state_slots": batch["state_slots"].tolist() + [0] * pad_rows,
        "has_initial_state": [c > 0 for c in context] + [False] * pad_rows,
    }
    wanted = [token for start, n in zip(starts[1:], logits, strict=True) for token in range(start - n, start)]
    expected["logits_indices"] = wanted + [max(0, starts[-1] - 1)] * (num_sequences - len(wanted))
    expected |= {f"slot_mapping_{group}": slot + [0] * pad_tokens for group, slot in slots.items()}
    return expected


@settings(deadline=None)
@given(batches())
def test_fields_of_a_nested_batch_equal_the_naive_loops(case: tuple[LayoutSpec, dict]) -> None:
    spec, batch = case
    nested = nest_sequences(**batch, spec=spec)
    layout, num_tokens = nested.layout, nested.input_ids.shape[0]
    per_token = {"position_ids", "is_token"}
    for name, expected in naive_fields(spec, batch).items():
        if name.startswith("slot_mapping_"):
            group = int(name.removeprefix("slot_mapping_"))
            actual = field_named("slot_mapping").op(layout, num_tokens, group, spec.num_groups, spec.page_size)
        else:
            actual = field_named(name).op(layout, num_tokens) if name in per_token else field_named(name).op(layout)
        assert actual.tolist() == expected, name
    ids = batch["token_ids"].tolist()
    assert nested.input_ids.tolist() == ids + [0] * (num_tokens - len(ids))
    assert nested.layout.dtype is nested.input_ids.dtype is torch.int32
    assert nested.layout.data_ptr() % 16 == nested.buffer.data_ptr() % 16, "Inductor would clone the layout"


@settings(deadline=None)
@given(batches())
def test_unused_entries_and_padding_rows_name_only_scratch(case: tuple[LayoutSpec, dict]) -> None:
    spec, batch = case
    num_sequences = len(batch["query_lens"])
    size = 200 + 60 * spec.num_columns(batch["pages_per_sequence"])
    nested = nest_sequences(**batch, spec=spec, arena=Arena(torch.full((size,), 99, dtype=torch.int32)))
    assert not nested.layout[num_sequences:].any()
    for group, span in enumerate(spec.spans):
        table = field_named("block_table").op(nested.layout, group, spec.num_groups)
        for row in range(num_sequences):
            new, cached = int(batch["query_lens"][row]), int(batch["context_lens"][row])
            first = spans.first(span, cached) // spec.page_size
            last = (cached + new - 1) // spec.page_size
            assert table[row, first : last + 1].all()
            assert not table[row, :first].any()
            assert not table[row, last + 1 :].any()


def decode_batch() -> dict:
    """Two sequences at position 9 of page size 4: three pages each, the first behind the window of group 1."""
    return {
        "token_ids": np.array([5, 6]),
        "query_lens": np.array([1, 1]),
        "context_lens": np.array([9, 9]),
        "block_tables": np.array([[[1, 2, 3], [4, 5, 6]], [[0, 2, 3], [0, 5, 6]]]),
        "state_slots": np.array([1, 2]),
        "num_pages": (7, 7),
        "num_state_slots": 3,
    }


def table_with(group: int, row: int, entry: int, page: int) -> np.ndarray:
    tables = decode_batch()["block_tables"]
    tables[group, row, entry] = page
    return tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_lens": [1, 0], "token_ids": [5]}, r"query_len is 0\n.*sequence 1"),
        ({"query_lens": [2, -1], "token_ids": [5]}, r"query_len is -1\n.*sequence 1"),
        ({"context_lens": [9, -2]}, r"context_len is -2\n.*sequence 1"),
        ({"token_ids": [5, 6, 7]}, "query_lens add up to 2, but there are 3"),
        ({"token_ids": [5.0, 6.0]}, "token_ids is float64"),
        ({"context_lens": [9, 12]}, r"12 cached and 1 new tokens, but its block table holds 12\n.*sequence 1"),
        ({"context_lens": np.array([9, 2**31 - 1], dtype=np.int32)}, "block table holds 12"),
        ({"pages_per_sequence": 2}, r"block table holds 8\n.*sequence 0"),
        ({"context_lens": [9]}, r"context_lens has shape \(1,\) for 2 sequences"),
        ({"block_tables": np.ones((1, 2, 3), dtype=np.int32)}, r"block_tables has shape \(1, 2, 3\)"),
        ({"block_tables": table_with(0, 1, 0, 0)}, r"entry 0 .* is page 0, outside 1\.\.6\n.*sequence 1, KV group 0"),
        ({"block_tables": table_with(1, 0, 2, 7)}, r"entry 2 .* is page 7, outside 1\.\.6\n.*sequence 0, KV group 1"),
        ({"block_tables": table_with(1, 0, 1, -1)}, r"is page -1, outside 1\.\.6"),
        ({"block_tables": table_with(0, 1, 2, 3)}, r"page 3 will be written.*\[0, 1\]\n.*sequence 0, KV group 0"),
        ({"block_tables": table_with(0, 1, 0, 3)}, r"page 3 will be written.*\[0, 1\]\n.*sequence 0, KV group 0"),
        ({"block_tables": table_with(0, 1, 0, 6)}, r"page 6 will be written.*\[1\]\n.*sequence 1, KV group 0"),
        ({"token_ids": np.array([5, -1])}, r"token id -1 is negative\n.*sequence 1"),
        ({"state_slots": [1, 3]}, r"state slot 3 is outside 1\.\.2\n.*sequence 1"),
        ({"state_slots": [0, 1]}, r"state slot 0 is outside 1\.\.2\n.*sequence 0"),
        ({"state_slots": [2, 2]}, r"state slot 2 is shared"),
        ({"num_logits": [1, 2]}, r"num_logits is 2 for 1 new tokens\n.*sequence 1"),
        ({"num_logits": [-1, 1]}, r"num_logits is -1 for 1 new tokens\n.*sequence 0"),
        ({"num_logits": [1]}, r"num_logits has shape \(1,\) for 2 sequences"),
        ({"num_logits": [1.0, 1.0]}, "num_logits is float64"),
        ({"pad_tokens": 100}, r"100 tokens and 2 rows of 10 need 120 int32, the arena has 50"),
    ],
)
def test_an_invalid_batch_is_refused_and_nothing_is_written(change: dict, message: str) -> None:
    arena = Arena(torch.full((50,), 99, dtype=torch.int32))
    with pytest.raises(LayoutError, match=message):
        nest_sequences(**(decode_batch() | change), spec=SPEC, arena=arena)
    assert arena.buffer.eq(99).all()


def test_a_page_that_nobody_writes_may_be_shared() -> None:
    nested = nest_sequences(**(decode_batch() | {"block_tables": table_with(0, 1, 0, 1)}), spec=SPEC)
    assert nested.layout[:, NUM_FIXED_COLUMNS].tolist() == [1, 1]


def test_an_arena_must_be_int32() -> None:
    with pytest.raises(LayoutError, match=r"dtype torch\.int64"):
        Arena(torch.zeros(100, dtype=torch.int64))


def test_to_copies_once_and_outlives_the_arena() -> None:
    arena = Arena.allocate(2, 2, SPEC.num_columns(3))
    nested = nest_sequences(**decode_batch(), spec=SPEC, arena=arena)
    moved = nested.to(torch.device("cpu"))
    expected = nested.layout.clone()
    arena.buffer.zero_()
    assert torch.equal(moved.layout, expected)
    assert moved.input_ids.tolist() == [5, 6]
