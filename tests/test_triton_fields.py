"""All fields of one launch, against their formulas, bit for bit.

The kernel is interpreted on CPU tensors, or runs on a GPU where there is one: then at the largest sizes, too.
"""

from __future__ import annotations

import inspect
import re
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import triton_device
from ragged import make_batch
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code

from autodeploy.kernels.field_arena import _VIEWS_BOOLEANS, LAUNCHER, choose_blocks
from autodeploy.kernels.registry import catalogue, field_named
from autodeploy.metadata import fields
from autodeploy.metadata.field import FieldRequest
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS

__all__ = ["triton_device"]


def every_request(num_groups: int, page_sizes: tuple[int, ...], tile_sizes: tuple[int, ...]) -> list[FieldRequest]:
    """Every field that the launcher knows, with all combinations of parameters."""
    values = {"group": range(num_groups), "num_groups": [num_groups], "page_size": page_sizes}
    values |= {"span": ["full", "window_1", "window_5", "chunk_1", "chunk_6"], "block_size": tile_sizes}
    found = []
    for entry in catalogue():
        names = [name for name in inspect.signature(entry.formula).parameters if name not in ("layout", "num_tokens")]
        if LAUNCHER.supports(FieldRequest(entry.name, ())):
            found += [FieldRequest(entry.name, given) for given in product(*(values[name] for name in names))]
    return found


def by_formula(layout: Tensor, num_tokens: int, request: FieldRequest) -> Tensor:
    entry = field_named(request.name)
    takes_tokens = "num_tokens" in inspect.signature(entry.formula).parameters
    return entry.op(layout, *([num_tokens] if takes_tokens else []), *request.parameters)


def check(layout: Tensor, num_tokens: int, wanted: list[FieldRequest]) -> None:
    """One launch gives what all formulas give, each field at a multiple of 16 bytes."""
    got = LAUNCHER.launch(layout, num_tokens, wanted)
    for request, value in zip(wanted, got, strict=True):
        expected = by_formula(layout, num_tokens, request)
        assert value.dtype is expected.dtype, request
        assert value.data_ptr() % 16 == 0, request
        assert torch.equal(value, expected), request


def random_layout(seed: int, rows: int, tokens: int, groups: int, pages: int, page_size: int) -> Tensor:
    """Rows of up to P pages with `tokens` new tokens at most in all: none, one or many each, and padding at the end."""
    generator = torch.Generator().manual_seed(seed)

    def draw(highest: int) -> Tensor:
        return torch.randint(0, highest + 1, (rows,), generator=generator)

    longest = min(pages * page_size, max(2, 4 * tokens // rows))
    query_S = torch.stack([draw(1), draw(longest), draw(longest) ** 2 // longest])[
        draw(2) * (seed % 3 > 0), range(rows)
    ]
    query_S = torch.where(query_S.cumsum(0) <= tokens, query_S, 0)
    context_S = (draw(pages * page_size) - query_S).clamp(min=0)
    # Of so many as there are rows, all of a token at least want their logits.
    logits_S = torch.minimum(query_S, torch.ones(rows) + draw(9) * (draw(7) == 0))
    logits_S = torch.where(logits_S.cumsum(0) <= rows, logits_S, 0)
    padding = torch.arange(rows) >= rows - rows // 8
    table = torch.randint(1, 1 << 20, (rows, groups * pages), generator=generator, dtype=torch.int32)
    fixed = torch.stack([query_S, context_S, draw(rows), logits_S], dim=1).int()
    return torch.where(padding[:, None], 0, torch.cat([fixed, table], dim=1))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, list[FieldRequest]]:
    page_size, num_groups = draw(st.sampled_from([1, 3, 16, 256])), draw(st.integers(1, 8))
    lengths = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=6))
    batch = make_batch(
        lengths,
        page_size=page_size,
        num_groups=num_groups,
        padding_rows=draw(st.integers(0, 2)),
        padding_tokens=draw(st.integers(0, 9)),
        spare_pages=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 99)),
        num_logits=[draw(st.integers(0, query)) for query, _ in lengths],
    )
    known = every_request(num_groups, (page_size, 2 * page_size), (1, 4, 16))
    wanted = draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
    return batch.layout(), batch.num_tokens, draw(st.sampled_from([wanted, known]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_fields_are_their_formulas(triton_device: torch.device, case: tuple[Tensor, int, list[FieldRequest]]) -> None:
    layout, num_tokens, wanted = case
    check(layout.to(triton_device), num_tokens, wanted)


BORDERS = {
    "one token": ([(1, 0)], {}),
    "nobody": ([(0, 0)], {}),
    "all padding": ([(0, 0)] * 3, {"padding_tokens": 9}),
    "all of its logits": ([(9, 4), (1, 7), (3, 0)], {"num_logits": [9, 0, 2], "padding_rows": 12}),
    "padding": ([(3, 0), (1, 7)], {"padding_rows": 3, "padding_tokens": 5}),
    "decode of more rows than are looked at once": ([(1, row % 9) for row in range(65)], {}),
    "pages of one token, eight groups": ([(2, 3), (0, 4), (9, 0)], {"page_size": 1, "num_groups": 8}),
    "pages of 256 tokens": ([(300, 0), (1, 255), (1, 256)], {"page_size": 256, "num_groups": 3}),
    "tables longer than a block": ([(1, 300), (2, 0)], {"page_size": 1, "spare_pages": 5}),
}


@pytest.mark.parametrize(("lengths", "options"), BORDERS.values(), ids=BORDERS)
def test_borders(triton_device: torch.device, lengths: list[tuple[int, int]], options: dict[str, int]) -> None:
    batch = make_batch(lengths, **options)
    wanted = every_request(batch.num_groups, (batch.page_size,), (2, 128))
    check(batch.layout().to(triton_device), batch.num_tokens, wanted)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 5000), (130, 4100), (1030, 40)])
def test_blocks_are_repeated(triton_device: torch.device, rows: int, tokens: int) -> None:
    blocks = choose_blocks(rows, tokens)
    assert rows == 1 or rows > min(blocks["R"], blocks["ROW_BLOCK"])
    layout = random_layout(0, rows, tokens, groups=2, pages=3, page_size=16)
    wanted = [request for request in every_request(2, (16,), (128,)) if "page_indices" not in request.name]
    check(layout.to(triton_device), tokens, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too slow to interpret")
def test_large_layouts() -> None:
    for seed in range(60):
        check_large(seed)
    largest = random_layout(1, 1024, 32768, groups=8, pages=64, page_size=16).cuda()
    check(largest, 32768, every_request(8, (16,), (16, 128)))


def check_large(seed: int) -> None:
    """One random layout of up to 1,024 rows, 32,768 tokens and 8 groups; every third a decode step."""
    generator = torch.Generator().manual_seed(seed)

    def power(highest: int) -> int:
        return int(2 ** (torch.rand((), generator=generator) * highest))

    rows, groups, pages, page_size = power(10), power(3), power(7), power(8)
    tokens = max(1, rows if seed % 3 == 0 else power(15))
    layout = random_layout(seed, rows, tokens, groups, pages, page_size)
    assert layout.shape == (rows, NUM_FIXED_COLUMNS + groups * pages)
    check(layout.cuda(), tokens, every_request(groups, (page_size, 2 * page_size), (16, 128)))


@pytest.mark.skipif(not _VIEWS_BOOLEANS, reason="this Inductor cannot view memory as booleans")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, on import
def test_compiled_code_reads_the_arena_in_place(triton_device: torch.device) -> None:
    wanted = [
        FieldRequest("slot_mapping", (0, 1, 4)),
        FieldRequest("cu_seqlens_q", ()),
        FieldRequest("seq_lens", ()),
        FieldRequest("is_token", ()),
    ]

    def step(layout: Tensor, hidden: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        slots, starts, lens, is_token = LAUNCHER.launch(layout, hidden.shape[2], wanted)
        for cache in (key_cache, value_cache):
            torch.ops.autodeploy.reference_append(hidden, cache, slots)
        table = fields.block_table(layout, 0, 1)
        out = torch.ops.autodeploy.reference_paged_attention(
            hidden, None, key_cache, value_cache, table, lens, starts, scale=1.0
        )
        return torch.where(is_token[:, None, None], out, 0)

    compiled = torch.compile(fx.symbolic_trace(step), fullgraph=True, dynamic=True)
    for lengths in ([(3, 0), (1, 9), (2, 5)], [(1, 4), (1, 8), (1, 30), (1, 2), (7, 1)]):
        batch = make_batch(lengths, padding_rows=1, padding_tokens=2)
        hidden = torch.randn(1, 2, batch.num_tokens, 8, device=triton_device)
        caches = [torch.zeros(batch.num_pages, 4, 2, 8, device=triton_device) for _ in range(4)]
        layout = batch.layout().to(triton_device)
        out, codes = run_and_get_code(compiled, layout, hidden, *caches[:2])
        torch.testing.assert_close(out, step(layout, hidden, *caches[2:]))
        for code in codes:
            assert len(re.findall(r"launch_fields\.default\(", code)) == 1
            (arguments,) = re.findall(r"reference_paged_attention\.default\((.*)\)", code)
            assert len(re.findall(r"reinterpret_tensor\(buf", arguments)) == 2
            assert "copy" not in arguments
            assert "clone" not in arguments
