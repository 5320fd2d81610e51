"""Every field against a loop that a reader can check by eye."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import Batch, Row, make_batch
from spans import SPANS, first

from autodeploy.errors import OptionError, UnknownName
from autodeploy.kernels.registry import catalogue, field_named
from autodeploy.metadata import fields
from autodeploy.metadata.field import Field, field, num_ops
from autodeploy.metadata.span import span_of

ORACLES: dict[str, Callable[..., list]] = {}
PARAMETERS = {"kernel_size": 4, "num_kv_heads": 3, "block_size": 4, "chunk_size": 4}


def oracle(function: Callable[..., list]) -> Callable[..., list]:
    ORACLES[function.__name__] = function
    return function


def tokens(batch: Batch) -> list[tuple[int, Row, int]]:
    """(row index, row, position) of each real token."""
    return [(r, row, row.context_len + i) for r, row in enumerate(batch.rows) for i in range(row.query_len)]


def padded(batch: Batch, values: list, padding: object) -> list:
    return values + [padding] * (batch.num_tokens - len(values))


def starts(batch: Batch) -> list[int]:
    return list(accumulate((row.query_len for row in batch.rows), initial=0))


def pages_in_use(batch: Batch, row: Row) -> int:
    return -(-row.seq_len // batch.page_size)


def table(batch: Batch, row: Row, group: int) -> list[int]:
    return [*row.tables[group], *[0] * (batch.pages_per_sequence - len(row.tables[group]))]


@oracle
def query_lens(batch: Batch) -> list:
    return [row.query_len for row in batch.rows]


@oracle
def context_lens(batch: Batch) -> list:
    return [row.context_len for row in batch.rows]


@oracle
def seq_lens(batch: Batch) -> list:
    return [row.seq_len for row in batch.rows]


@oracle
def cu_seqlens_q(batch: Batch) -> list:
    return starts(batch)


@oracle
def token_to_seq(batch: Batch) -> list:
    return padded(batch, [r for r, _, _ in tokens(batch)], len(batch.rows) - 1)


@oracle
def is_token(batch: Batch) -> list:
    return padded(batch, [True] * batch.total, False)


@oracle
def position_ids(batch: Batch) -> list:
    return padded(batch, [position for _, _, position in tokens(batch)], 0)


@oracle
def block_table(batch: Batch, group: int) -> list:
    return [table(batch, row, group) for row in batch.rows]


def slot(batch: Batch, row: Row, group: int, position: int) -> int:
    return row.tables[group][position // batch.page_size] * batch.page_size + position % batch.page_size


@oracle
def slot_mapping(batch: Batch, group: int) -> list:
    return padded(batch, [slot(batch, row, group, position) for _, row, position in tokens(batch)], 0)


@oracle
def state_slots(batch: Batch) -> list:
    return [row.state_slot for row in batch.rows]


@oracle
def has_initial_state(batch: Batch) -> list:
    return [row.context_len > 0 for row in batch.rows]


@oracle
def logits_indices(batch: Batch) -> list:
    ends = zip(batch.rows, starts(batch)[1:], strict=True)
    wanted = [token for row, end in ends for token in range(end - row.num_logits, end)]
    return wanted + [max(0, batch.total - 1)] * (len(batch.rows) - len(wanted))


@oracle
def kv_page_indptr(batch: Batch) -> list:
    return list(accumulate((pages_in_use(batch, row) for row in batch.rows), initial=0))


@oracle
def last_page_len(batch: Batch) -> list:
    p = batch.page_size
    return [row.seq_len - p * (pages_in_use(batch, row) - 1) if row.seq_len else p for row in batch.rows]


@oracle
def first_seen(batch: Batch, span: str) -> list:
    return [first(span_of(span), row.context_len) for row in batch.rows]


@oracle
def head_slots(batch: Batch, group: int, num_kv_heads: int) -> list:
    def places(page: int, offset: int) -> list[int]:
        return [(page * num_kv_heads + k) * batch.page_size + offset for k in range(num_kv_heads)]

    slots = [divmod(slot(batch, row, group, position), batch.page_size) for _, row, position in tokens(batch)]
    return padded(batch, [places(*place) for place in slots], places(0, 0))


@oracle
def decode_pages(batch: Batch, group: int, num_kv_heads: int, span: str) -> list:
    rows = []
    for row in batch.rows:
        pages = table(batch, row, group)
        seen = pages[first(span_of(span), max(0, row.seq_len - 1)) // batch.page_size :]
        seen += [pages[-1]] * (len(pages) - len(seen))
        rows.append([[page * num_kv_heads + k for page in seen] for k in range(num_kv_heads)])
    return rows


@oracle
def decode_mask(batch: Batch, span: str) -> list:
    rows = []
    for row in batch.rows:
        begin = first(span_of(span), max(0, row.seq_len - 1))
        start = begin // batch.page_size * batch.page_size
        rows.append([begin <= start + i < row.seq_len for i in range(batch.pages_per_sequence * batch.page_size)])
    return rows


def sources(batch: Batch, r: int, row: Row, positions: range, kernel_size: int) -> list[int]:
    """Where the inputs at `positions` of sequence r lie in [tokens | cached inputs | zero]."""
    taps = kernel_size - 1
    first_cached, zero = batch.num_tokens + r * taps, batch.num_tokens + len(batch.rows) * taps
    places = []
    for position in positions:
        new = position - row.context_len
        cached = first_cached + taps + new if row.context_len else zero
        places.append(starts(batch)[r] + new if new >= 0 else cached)
    return places


@oracle
def conv_window_indices(batch: Batch, kernel_size: int) -> list:
    zero = batch.num_tokens + len(batch.rows) * (kernel_size - 1)
    windows = [sources(batch, r, row, range(at + 1 - kernel_size, at + 1), kernel_size) for r, row, at in tokens(batch)]
    return padded(batch, windows, [zero] * kernel_size)


@oracle
def conv_state_indices(batch: Batch, kernel_size: int) -> list:
    return [
        sources(batch, r, row, range(row.seq_len - kernel_size + 1, row.seq_len), kernel_size)
        for r, row in enumerate(batch.rows)
    ]


@oracle
def updated_slots(batch: Batch) -> list:
    return [row.state_slot if row.query_len else -1 for row in batch.rows]


@oracle
def fresh_slots(batch: Batch) -> list:
    return [0 if row.context_len else row.state_slot for row in batch.rows]


def stream(batch: Batch, kernel_size: int) -> list[int]:
    """Each sequence's new tokens behind the inputs before them; padding tokens go on after the last."""
    places = []
    for r, row in enumerate(batch.rows):
        places += sources(batch, r, row, range(row.context_len - kernel_size + 1, row.seq_len), kernel_size)
    return places + list(range(batch.total, batch.num_tokens))


@oracle
def conv_stream_indices(batch: Batch, kernel_size: int) -> list:
    return stream(batch, kernel_size)


@oracle
def conv_stream_places(batch: Batch, kernel_size: int) -> list:
    return [stream(batch, kernel_size).index(token) for token in range(batch.num_tokens)]


@oracle
def query_tiles(batch: Batch, block_size: int) -> list:
    tiles = []
    for r, row in enumerate(batch.rows):
        if row.query_len > 1:
            tiles += [[r, starts(batch)[r] + first] for first in range(0, row.query_len, block_size)]
    places = len(batch.rows) + batch.num_tokens // block_size
    return tiles + [[-1, 0]] * (places - len(tiles))


def chunks(batch: Batch, size: int) -> list[list[list[int]]]:
    """The tokens of each chunk of each row."""
    spans = zip(batch.rows, starts(batch), strict=False)
    return [
        [[begin + i for i in range(first, min(first + size, row.query_len))] for first in range(0, row.query_len, size)]
        for row, begin in spans
    ]


@oracle
def cu_chunks(batch: Batch, chunk_size: int) -> list:
    return list(accumulate((len(of_row) for of_row in chunks(batch, chunk_size)), initial=0))


@oracle
def chunk_to_seq(batch: Batch, chunk_size: int) -> list:
    of_chunks = [row for row, of_row in enumerate(chunks(batch, chunk_size)) for _ in of_row]
    places = len(batch.rows) + batch.num_tokens // chunk_size
    return of_chunks + [len(batch.rows) - 1] * (places - len(of_chunks))


@oracle
def chunk_tokens(batch: Batch, chunk_size: int) -> list:
    flat = [chunk for of_row in chunks(batch, chunk_size) for chunk in of_row]
    flat += [[]] * (len(batch.rows) + batch.num_tokens // chunk_size - len(flat))
    return [chunk + [batch.num_tokens] * (chunk_size - len(chunk)) for chunk in flat]


@oracle
def chunk_places(batch: Batch, chunk_size: int) -> list:
    flat = [chunk for of_row in chunks(batch, chunk_size) for chunk in of_row]
    places = {token: c * chunk_size + i for c, chunk in enumerate(flat) for i, token in enumerate(chunk)}
    return padded(batch, [places[token] for token in range(batch.total)], 0)


def end_to_end(batch: Batch, pages: list[list[int]]) -> list[int]:
    flat = [page for row in pages for page in row]
    return flat + [0] * (len(batch.rows) * batch.pages_per_sequence - len(flat))


@oracle
def kv_page_indices(batch: Batch, group: int) -> list:
    return end_to_end(batch, [table(batch, row, group)[: pages_in_use(batch, row)] for row in batch.rows])


def pages_seen(batch: Batch, row: Row, span: str) -> range:
    return range(first(span_of(span), row.context_len) // batch.page_size, pages_in_use(batch, row))


@oracle
def seen_page_indptr(batch: Batch, span: str) -> list:
    return list(accumulate((len(pages_seen(batch, row, span)) for row in batch.rows), initial=0))


@oracle
def seen_page_indices(batch: Batch, group: int, span: str) -> list:
    return end_to_end(
        batch, [[table(batch, row, group)[page] for page in pages_seen(batch, row, span)] for row in batch.rows]
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=6))
    return make_batch(
        lengths,
        page_size=draw(st.sampled_from([1, 4, 16])),
        num_groups=draw(st.integers(1, 3)),
        padding_rows=draw(st.integers(0, 2)),
        padding_tokens=draw(st.integers(0, 3)),
        spare_pages=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 99)),
        num_logits=[draw(st.integers(0, query)) for query, _ in lengths],
    )


def arguments(function: Callable[..., object], batch: Batch, group: int, span: str) -> dict[str, object]:
    """The values of a formula's or an oracle's parameters, by name."""
    known = {"layout": batch.layout(), "batch": batch, "group": group, "span": span, **PARAMETERS}
    sizes = {name: getattr(batch, name) for name in ("num_tokens", "num_groups", "page_size")}
    return {name: (known | sizes)[name] for name in inspect.signature(function).parameters}


def compute(entry: Field, batch: Batch, group: int, span: str) -> torch.Tensor:
    return entry.op(*arguments(entry.formula, batch, group, span).values())


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
@settings(max_examples=60, deadline=None)
@given(batch=batches(), data=st.data())
def test_field_is_its_oracle(entry: Field, batch: Batch, data: st.DataObject) -> None:
    group, span = data.draw(st.integers(0, batch.num_groups - 1)), data.draw(st.sampled_from(SPANS)).name
    got = compute(entry, batch, group, span)
    expected = ORACLES[entry.name](**arguments(ORACLES[entry.name], batch, group, span))
    assert got.tolist() == expected
    letters, dtype = entry.shape.rsplit(" ", 1)
    assert str(got.dtype) == f"torch.{dtype}"
    assert got.ndim == letters.count(",") + 1


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_equal_forms(batch: Batch) -> None:
    """What other engines compute under other names or by other formulas is the same field."""
    layout, p = batch.layout(), batch.page_size
    query, seq, starts = fields.query_lens(layout), fields.seq_lens(layout), fields.cu_seqlens_q(layout)
    assert torch.equal(starts.diff(), query)
    assert torch.equal(seq - starts.diff(), fields.context_lens(layout))
    assert torch.equal(fields.last_page_len(layout, p), torch.where(seq % p == 0, p, seq % p))
    by_search = fields.token_to_seq(layout, batch.num_tokens)[: batch.total]
    assert by_search.tolist() == torch.repeat_interleave(torch.arange(len(query)), query).tolist()
    assert torch.equal(fields.kv_page_indptr(layout, p).diff(), -(-seq // p))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, on import
def test_fields_compile() -> None:
    parameters = {entry: list(inspect.signature(entry.formula).parameters) for entry in catalogue()}

    def everything(layout: torch.Tensor, num_tokens: int) -> list[torch.Tensor]:
        known = {
            "layout": layout,
            "num_tokens": num_tokens,
            "group": 1,
            "num_groups": 2,
            "page_size": 4,
            "span": "window_5",
        } | PARAMETERS
        return [entry.op(*(known[name] for name in names)) for entry, names in parameters.items()]

    compiled = torch.compile(everything, fullgraph=True, dynamic=True)
    for lengths in ([(3, 0), (1, 9), (2, 5)], [(1, 4), (1, 8), (1, 30), (1, 2), (7, 1)]):
        wanted = [query for query, _ in lengths]
        batch = make_batch(lengths, num_groups=2, padding_rows=1, padding_tokens=2, num_logits=wanted)
        expected = everything(batch.layout(), batch.num_tokens)
        for entry, got, want in zip(parameters, compiled(batch.layout(), batch.num_tokens), expected, strict=True):
            assert torch.equal(got, want), entry.name


def test_unknown_field_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean 'seq_lens'"):
        field_named("seqlens")


def test_a_name_is_registered_once() -> None:
    def seq_lens(layout: torch.Tensor) -> torch.Tensor:
        return layout[:, 0]

    with pytest.raises(OptionError, match="registered twice"):
        field(shape="[S] int32")(seq_lens)


def test_each_field_costs_some_ops() -> None:
    assert all(num_ops(entry.op) >= 1 for entry in catalogue())
