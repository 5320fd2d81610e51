"""All fields of a prepare_metadata on a GPU by one launch, into one arena.

The arena is int32 words. Its fields lie in *sections* of fields that belong to the same places: tokens, rows, query
tiles, page entries or rows of logits. A program computes some places of one section and writes all its fields there. No
program waits for another: each derives the sums that it needs from the S query lengths, which are short.

Shapes: S sequences, T packed tokens (padding included), P pages per sequence, G KV groups, N places of one program,
R rows that are looked at together.
"""

from __future__ import annotations

# Triton's types are those of a kernel's caller, not of its body.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import triton
import triton.language as tl

from autodeploy.kernels.triton_span import first_seen
from autodeploy.metadata import layout as columns

_QUERY_LEN = tl.constexpr(columns.QUERY_LEN)
_CONTEXT_LEN = tl.constexpr(columns.CONTEXT_LEN)
_NUM_LOGITS = tl.constexpr(columns.NUM_LOGITS)
_TABLES = tl.constexpr(columns.NUM_FIXED_COLUMNS)


@triton.constexpr_function
def _at(values, *path):
    """An entry of nested constexpr tuples, which not every version of Triton takes apart by itself."""
    for index in path:
        values = values[index]
    return values


@triton.jit
def num_places(AXIS: tl.constexpr, PARAMETERS: tl.constexpr, num_rows, num_tokens, table_columns):
    """Places of a section; the host calls the same function, of symbolic sizes too."""
    if AXIS == "token":
        return num_tokens
    elif AXIS == "row":
        return num_rows + 1
    elif AXIS == "tile":
        return num_rows + num_tokens // PARAMETERS[0]
    elif AXIS == "logit":
        return num_rows
    else:
        return num_rows * (table_columns // PARAMETERS[0])


@triton.jit
def num_programs(AXIS: tl.constexpr, places, num_rows, N: tl.constexpr, R: tl.constexpr):
    """Programs of a section with that many places."""
    if AXIS == "row":
        return (num_rows + R - 1) // R
    elif AXIS == "page":
        return num_rows
    else:
        return (places + N - 1) // N


@triton.jit
def slot_words(AXIS: tl.constexpr, places):
    """Words from one field of a section to the next: 8 bytes for each place, 4 for page numbers, in steps of 16."""
    if AXIS == "page":
        return (places + 3) // 4 * 4
    else:
        return (places + 1) // 2 * 4


@triton.jit
def _lengths(layout, row, num_rows, row_stride):
    lengths = layout + row * row_stride
    query = tl.load(lengths + _QUERY_LEN, mask=row < num_rows, other=0)
    context = tl.load(lengths + _CONTEXT_LEN, mask=row < num_rows, other=0)
    return query, context


@triton.jit
def _count(query, context, AXIS: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr = 0):
    """How many places of an axis a sequence owns; `SIZE` is the tile's or the page's, pages are those that are seen."""
    if AXIS == "tile":
        return tl.where(query > 1, (query + SIZE - 1) // SIZE, 0)
    elif AXIS == "page":
        return tl.maximum((query + context + SIZE - 1) // SIZE - _first_page(context, SIZE, SPAN), 0)
    else:
        return query


@triton.jit
def _first_page(context, SIZE: tl.constexpr, SPAN: tl.constexpr):
    return first_seen(context, SPAN) // SIZE


@triton.jit
def _ends(
    layout,
    query,
    context,
    first_row,
    num_rows,
    row_stride,
    R: tl.constexpr,
    AXIS: tl.constexpr,
    SIZE: tl.constexpr = 0,
    SPAN: tl.constexpr = 0,
):
    """Where the places of each of R rows from `first_row` on end."""
    before = 0
    for first in range(0, first_row, R):
        earlier_query, earlier_context = _lengths(layout, first + tl.arange(0, R), num_rows, row_stride)
        before += tl.sum(_count(earlier_query, earlier_context, AXIS, SIZE, SPAN), 0)
    return before + tl.cumsum(_count(query, context, AXIS, SIZE, SPAN), 0)


@triton.jit
def _find(layout, place, num_rows, row_stride, AXIS: tl.constexpr, SIZE: tl.constexpr, R: tl.constexpr):
    """The row that owns each of N places, -1 where none does, and what to add to the place.

    That gives a token's position, and added to the tile's size times the place, a tile's first token.
    """
    row_N = tl.full(place.shape, -1, tl.int32)
    shift_N = tl.zeros(place.shape, tl.int32)
    places_before = 0
    tokens_before = 0
    for first in range(0, num_rows, R):
        row_R = first + tl.arange(0, R)
        query_R, context_R = _lengths(layout, row_R, num_rows, row_stride)
        count_R = _count(query_R, context_R, AXIS, SIZE)
        end_R = places_before + tl.cumsum(count_R, 0)
        begin_R = end_R - count_R
        if AXIS == "tile":
            shift_R = tokens_before + tl.cumsum(query_R, 0) - query_R - begin_R * SIZE
            tokens_before += tl.sum(query_R, 0)
        else:
            shift_R = context_R - begin_R
        owns_NR = (begin_R[None, :] <= place[:, None]) & (place[:, None] < end_R[None, :])
        row_N += tl.sum(tl.where(owns_NR, row_R[None, :] + 1, 0), 1)
        shift_N += tl.sum(tl.where(owns_NR, shift_R[None, :], 0), 1)
        places_before += tl.sum(count_R, 0)
    return row_N, shift_N


@triton.jit
def _write_rows(layout, slot, first_row, num_rows, row_stride, FIELDS: tl.constexpr, R: tl.constexpr):
    row_R = first_row + tl.arange(0, R)
    query_R, context_R = _lengths(layout, row_R, num_rows, row_stride)
    end_R = _ends(layout, query_R, context_R, first_row, num_rows, row_stride, R, "token")
    for i in tl.static_range(len(FIELDS)):
        if _at(FIELDS, i, 0) == "seen_page_indptr":
            page_end_R = _ends(
                layout,
                query_R,
                context_R,
                first_row,
                num_rows,
                row_stride,
                R,
                "page",
                _at(FIELDS, i, 2, 0),
                _at(FIELDS, i, 2, 1),
            )
            _write_starts(slot, row_R, page_end_R, num_rows)
        elif _at(FIELDS, i, 0) == "cu_seqlens_q":
            _write_starts(slot, row_R, end_R, num_rows)
        else:
            _write_row_field(slot, row_R, num_rows, query_R, context_R, FIELDS, i)
        slot += slot_words("row", num_rows + 1)


@triton.jit
def _write_starts(slot, row_R, end_R, num_rows):
    tl.store(slot + row_R, 0, mask=row_R == 0)
    tl.store(slot + 1 + row_R, end_R, mask=row_R < num_rows)


@triton.jit
def _write_row_field(slot, row_R, num_rows, query_R, context_R, FIELDS: tl.constexpr, INDEX: tl.constexpr):
    NAME: tl.constexpr = _at(FIELDS, INDEX, 0)
    PARAMETERS: tl.constexpr = _at(FIELDS, INDEX, 2)
    inside_R = row_R < num_rows
    if NAME == "seq_lens":
        tl.store(slot + row_R, context_R + query_R, mask=inside_R)
    elif NAME == "last_page_len":
        # The dividend is kept from being negative, where Triton's remainder is not Python's.
        length_R = (context_R + query_R + (PARAMETERS[0] - 1)) % PARAMETERS[0] + 1
        tl.store(slot + row_R, length_R, mask=inside_R)
    elif NAME == "first_seen":
        tl.store(slot + row_R, first_seen(context_R, PARAMETERS[0]), mask=inside_R)
    else:
        tl.static_assert(NAME == "has_initial_state")
        tl.store(slot.to(tl.pointer_type(tl.int8)) + row_R, (context_R > 0).to(tl.int8), mask=inside_R)


@triton.jit
def _write_tokens(
    layout,
    slot,
    first_token,
    num_rows,
    num_tokens,
    table_columns,
    row_stride,
    FIELDS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    token_N = first_token + tl.arange(0, N)
    row_N, shift_N = _find(layout, token_N, num_rows, row_stride, "token", 0, R)
    position_N = tl.where(row_N >= 0, token_N + shift_N, 0)
    for i in tl.static_range(len(FIELDS)):
        if _at(FIELDS, i, 0) == "slot_mapping":
            table_N = layout + _TABLES + row_N * row_stride
            _write_slots(slot, token_N, table_N, row_N, position_N, num_tokens, table_columns, FIELDS, i)
        else:
            _write_token_field(slot, token_N, row_N, position_N, num_rows, num_tokens, FIELDS, i)
        slot += _at(FIELDS, i, 1) * slot_words("token", num_tokens)


@triton.jit
def _write_token_field(
    slot, token_N, row_N, position_N, num_rows, num_tokens, FIELDS: tl.constexpr, INDEX: tl.constexpr
):
    NAME: tl.constexpr = _at(FIELDS, INDEX, 0)
    inside_N = token_N < num_tokens
    if NAME == "token_to_seq":
        tl.store(slot + token_N, tl.where(row_N >= 0, row_N, num_rows - 1), mask=inside_N)
    elif NAME == "position_ids":
        tl.store(slot + token_N, position_N, mask=inside_N)
    else:
        tl.static_assert(NAME == "is_token")
        tl.store(slot.to(tl.pointer_type(tl.int8)) + token_N, (row_N >= 0).to(tl.int8), mask=inside_N)


@triton.jit
def _write_slots(
    slot,
    token_N,
    table_N,
    row_N,
    position_N,
    num_tokens,
    table_columns,
    FIELDS: tl.constexpr,
    INDEX: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = _at(FIELDS, INDEX, 2, 0)
    PAGE_SIZE: tl.constexpr = _at(FIELDS, INDEX, 2, 2)
    # All groups at once: one after another, each would wait for its own page numbers.
    group_G = tl.arange(0, _at(FIELDS, INDEX, 2, 1))
    entry_NG = (position_N // PAGE_SIZE)[:, None] + (group_G * (table_columns // NUM_GROUPS))[None, :]
    mask_NG = (token_N < num_tokens)[:, None] & (group_G < NUM_GROUPS)[None, :]
    page_NG = tl.load(table_N[:, None] + entry_NG, mask=mask_NG & (row_N >= 0)[:, None], other=0)
    value_NG = page_NG.to(tl.int64) * PAGE_SIZE + (position_N % PAGE_SIZE)[:, None]
    stride = slot_words("token", num_tokens) // 2
    place_NG = token_N[:, None] + (group_G * stride)[None, :]
    tl.store(slot.to(tl.pointer_type(tl.int64)) + place_NG, value_NG, mask=mask_NG)


@triton.jit
def _write_tiles(
    layout, slot, first_tile, num_tiles, num_rows, row_stride, SIZE: tl.constexpr, N: tl.constexpr, R: tl.constexpr
):
    tile_N = first_tile + tl.arange(0, N)
    row_N, shift_N = _find(layout, tile_N, num_rows, row_stride, "tile", SIZE, R)
    token_N = tl.where(row_N >= 0, tile_N * SIZE + shift_N, 0)
    tl.store(slot + 2 * tile_N, row_N, mask=tile_N < num_tiles)
    tl.store(slot + 2 * tile_N + 1, token_N, mask=tile_N < num_tiles)


@triton.jit
def _write_logits(layout, slot, first_place, num_rows, row_stride, N: tl.constexpr, R: tl.constexpr):
    place_N = first_place + tl.arange(0, N)
    # One more than the token's place, 0 where no row wants it.
    token_N = tl.zeros([N], tl.int32)
    tokens_before = 0
    places_before = 0
    for first in range(0, num_rows, R):
        row_R = first + tl.arange(0, R)
        query_R, _ = _lengths(layout, row_R, num_rows, row_stride)
        count_R = tl.load(layout + row_R * row_stride + _NUM_LOGITS, mask=row_R < num_rows, other=0)
        end_R = places_before + tl.cumsum(count_R, 0)
        shift_R = tokens_before + tl.cumsum(query_R, 0) - end_R
        owns_NR = ((end_R - count_R)[None, :] <= place_N[:, None]) & (place_N[:, None] < end_R[None, :])
        token_N += tl.sum(tl.where(owns_NR, place_N[:, None] + shift_R[None, :] + 1, 0), 1)
        tokens_before += tl.sum(query_R, 0)
        places_before += tl.sum(count_R, 0)
    index_N = tl.where(token_N > 0, token_N - 1, tl.maximum(tokens_before - 1, 0)).to(tl.int64)
    tl.store(slot.to(tl.pointer_type(tl.int64)) + place_N, index_N, mask=place_N < num_rows)


@triton.jit
def _write_pages(
    layout,
    slot,
    row,
    num_rows,
    table_columns,
    row_stride,
    PARAMETERS: tl.constexpr,
    R: tl.constexpr,
    PAGE_BLOCK: tl.constexpr,
):
    before = 0
    total = 0
    for first in range(0, num_rows, R):
        row_R = first + tl.arange(0, R)
        query_R, context_R = _lengths(layout, row_R, num_rows, row_stride)
        count_R = _count(query_R, context_R, "page", PARAMETERS[2], PARAMETERS[3])
        before += tl.sum(tl.where(row_R < row, count_R, 0), 0)
        total += tl.sum(count_R, 0)
    query, context = _lengths(layout, row, num_rows, row_stride)
    used = _count(query, context, "page", PARAMETERS[2], PARAMETERS[3])
    num_pages = table_columns // PARAMETERS[0]
    group_G = tl.arange(0, PARAMETERS[1])
    first_page = _first_page(context, PARAMETERS[2], PARAMETERS[3])
    table_G = layout + _TABLES + row * row_stride + first_page + group_G * num_pages
    slot_G = slot + group_G * slot_words("page", num_rows * num_pages)
    # A row writes P entries: its pages after those of the rows before it, and then as many zeros as it has pages fewer
    # than P, after the zeros of the rows before it, of which there are `row * P - before`.
    first_zero = total + row * num_pages - before - used
    for first in range(0, num_pages, PAGE_BLOCK):
        entry = first + tl.arange(0, PAGE_BLOCK)
        is_used = entry < used
        place = entry + tl.where(is_used, before, first_zero)
        mask = (entry < num_pages)[:, None] & (group_G < PARAMETERS[0])[None, :]
        page = tl.load(table_G[None, :] + entry[:, None], mask=mask & is_used[:, None], other=0)
        tl.store(slot_G[None, :] + place[:, None], page, mask=mask)


@triton.jit
def _write_section(
    layout,
    slot,
    program,
    num_rows,
    num_tokens,
    table_columns,
    row_stride,
    PLAN: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PAGE_BLOCK: tl.constexpr,
):
    """Write what this program owns of a section, if anything; returns its number in, and the slot of, the next one."""
    AXIS: tl.constexpr = _at(PLAN, INDEX, 0)
    PARAMETERS: tl.constexpr = _at(PLAN, INDEX, 1)
    FIELDS: tl.constexpr = _at(PLAN, INDEX, 2)
    places = num_places(AXIS, PARAMETERS, num_rows, num_tokens, table_columns)
    programs = num_programs(AXIS, places, num_rows, N, ROW_BLOCK)
    if (program >= 0) & (program < programs):
        if AXIS == "row":
            _write_rows(layout, slot, program * ROW_BLOCK, num_rows, row_stride, FIELDS, ROW_BLOCK)
        elif AXIS == "page":
            _write_pages(layout, slot, program, num_rows, table_columns, row_stride, PARAMETERS, ROW_BLOCK, PAGE_BLOCK)
        elif AXIS == "tile":
            _write_tiles(layout, slot, program * N, places, num_rows, row_stride, PARAMETERS[0], N, R)
        elif AXIS == "logit":
            _write_logits(layout, slot, program * N, num_rows, row_stride, N, R)
        else:
            _write_tokens(layout, slot, program * N, num_rows, places, table_columns, row_stride, FIELDS, N, R)
    for i in tl.static_range(len(FIELDS)):
        slot += _at(FIELDS, i, 1) * slot_words(AXIS, places)
    return program - programs, slot


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "table_columns", "row_stride"])
def fields_kernel(
    layout,
    arena,
    num_rows,
    num_tokens,
    table_columns,
    row_stride,
    PLAN: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PAGE_BLOCK: tl.constexpr,
):
    """layout [S, 4 + G * P] int32 with `row_stride`, arena int32; the grid is the sum of all sections' programs."""
    program = tl.program_id(0)
    slot = arena
    for i in tl.static_range(len(PLAN)):
        program, slot = _write_section(
            layout,
            slot,
            program,
            num_rows,
            num_tokens,
            table_columns,
            row_stride,
            PLAN,
            i,
            N,
            R,
            ROW_BLOCK,
            PAGE_BLOCK,
        )
