"""Equal forms over a layout of our own become the fields that they are; and what must be left alone, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from form_graphs import computed
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import make_batch
from torch import Tensor, fx
from torch.nn.functional import pad

from autodeploy.equality import merge_equal
from autodeploy.graph import ROLE, record
from autodeploy.metadata import fields
from autodeploy.metadata.equal_forms import rewrite_equal_forms

INT32, INT64 = torch.int32, torch.int64
Write = Callable[[Tensor, int, int], Tensor]


def q_of(layout: Tensor) -> Tensor:
    return layout[:, 0]


def c_of(layout: Tensor) -> Tensor:
    return layout[:, 1]


def s_of(layout: Tensor) -> Tensor:
    return layout[:, 1] + layout[:, 0]


def sums(lengths: Tensor) -> Tensor:
    return pad(lengths.cumsum(0, dtype=INT32), (1, 0))


def search(layout: Tensor, T: int) -> Tensor:
    tokens = torch.arange(T, dtype=INT32, device=layout.device)
    return torch.searchsorted(sums(q_of(layout)), tokens, right=True, out_int32=True) - 1


def last_by_where(s: Tensor, p: int) -> Tensor:
    rest = s % p
    return torch.where(rest == 0, p, rest)


# By field: how a backend's author may write it, given the layout, T and the page size.
RAW: dict[str, tuple[Write, ...]] = {
    "query_lens": (
        lambda layout, T, p: q_of(layout),
        lambda layout, T, p: layout.select(1, 0),
        lambda layout, T, p: torch.diff(sums(q_of(layout))),
        lambda layout, T, p: torch.diff(fields.cu_seqlens_q(layout)),
        lambda layout, T, p: fields.cu_seqlens_q(layout)[1:] - fields.cu_seqlens_q(layout)[:-1],
        lambda layout, T, p: fields.seq_lens(layout) - c_of(layout),
    ),
    "context_lens": (
        lambda layout, T, p: c_of(layout),
        lambda layout, T, p: s_of(layout) - torch.diff(sums(q_of(layout))),
        lambda layout, T, p: fields.seq_lens(layout) - fields.query_lens(layout),
        lambda layout, T, p: fields.seq_lens(layout) - torch.diff(fields.cu_seqlens_q(layout)),
    ),
    "seq_lens": (
        lambda layout, T, p: s_of(layout),
        lambda layout, T, p: fields.query_lens(layout) + fields.context_lens(layout),
        lambda layout, T, p: c_of(layout) + torch.diff(fields.cu_seqlens_q(layout)),
    ),
    "cu_seqlens_q": (
        lambda layout, T, p: sums(q_of(layout)),
        lambda layout, T, p: sums(fields.query_lens(layout)),
        lambda layout, T, p: pad(q_of(layout).cumsum(0), (1, 0)).to(INT32),
        lambda layout, T, p: torch.cat([layout.new_zeros(1, dtype=INT32), q_of(layout).cumsum(0).to(INT32)]),
    ),
    "kv_page_indptr": (
        lambda layout, T, p: sums((s_of(layout) + p - 1) // p),
        lambda layout, T, p: sums(-(-fields.seq_lens(layout) // p)),
        lambda layout, T, p: sums(torch.div(fields.seq_lens(layout) + (p - 1), p, rounding_mode="floor")),
    ),
    "last_page_len": (
        lambda layout, T, p: (s_of(layout) - 1) % p + 1,
        lambda layout, T, p: last_by_where(s_of(layout), p),
        lambda layout, T, p: last_by_where(fields.seq_lens(layout), p),
        lambda layout, T, p: (r := fields.seq_lens(layout) % p).masked_fill(r == 0, p),
    ),
    "token_to_seq": (lambda layout, T, p: search(layout, T).clamp(max=layout.shape[0] - 1),),
}
REPEATED: tuple[Write, ...] = (
    lambda layout, T, p: torch.repeat_interleave(torch.arange(layout.shape[0]), q_of(layout), output_size=T).to(INT32),
    lambda layout, T, p: torch.repeat_interleave(
        torch.arange(layout.shape[0], dtype=INT32), fields.query_lens(layout).long(), output_size=T
    ),
)


def field_of(name: str, layout: Any, T: Any, p: int) -> Any:
    given = {"token_to_seq": (T,), "kv_page_indptr": (p,), "last_page_len": (p,)}.get(name, ())
    return fields.get(name).op(layout, *given)


def graph_of(page_size: int, write: Callable[[Any, Any, int], Any]) -> fx.GraphModule:
    """The graph of (layout, x [T]) that the passes would make: nothing is recorded but who the inputs are."""
    graph = fx.Graph()
    layout, x = graph.placeholder("layout"), graph.placeholder("x")
    layout.meta[ROLE] = "layout"
    num_tokens = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    kept = graph.call_function(fields.has_initial_state, (layout,))
    output = graph.output(None)
    made = record(output, lambda *args: write(*args, page_size), layout, num_tokens)
    output.args = ((kept, *made),)
    return fx.GraphModule({}, graph)


def rewrite(gm: fx.GraphModule) -> int:
    """Rewrite, merge, check what is owed, and give the number rewritten."""
    known = computed(gm)
    count = rewrite_equal_forms(gm.graph, known)
    gm.graph.lint()
    assert known == computed(gm)
    assert rewrite_equal_forms(gm.graph, known) == 0
    merge_equal(gm.graph, [node for node in gm.graph.nodes if node.op == "call_function"])
    gm.recompile()
    return count


def doubled(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ops.aten.mul.Tensor(tensor, 2) for tensor in tensors)


def all_raw(repeated: bool) -> Callable[[Any, Any, int], Any]:
    def write(layout: Any, T: Any, p: int) -> Any:
        found = [raw(layout, T, p) for name in RAW for raw in RAW[name]]
        found += [raw(layout, T, p) for raw in REPEATED] if repeated else []
        return doubled(*found)

    return write


def all_fields(layout: Tensor, T: int, p: int, repeated: bool) -> list[Tensor]:
    found = [field_of(name, layout, T, p) * 2 for name in RAW for _ in RAW[name]]
    return found + [field_of("token_to_seq", layout, T, p) * 2 for _ in REPEATED] * repeated


PAGES = (1, 2, 3, 4, 5, 16)


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("repeated", [False, True])
def test_all_become_fields(page_size: int, repeated: bool) -> None:
    gm = graph_of(page_size, all_raw(repeated))
    assert rewrite(gm) > 0
    read = {node.args[0] for node in gm.graph.nodes if node.target is torch.ops.aten.mul.Tensor}
    assert all(isinstance(node, fx.Node) and fields.is_field(node.target) for node in read)
    assert sorted(fields.of_op(node.target).name for node in read) == sorted(RAW)  # type: ignore[union-attr]


@pytest.mark.parametrize("page_size", PAGES[:5])
@pytest.mark.parametrize("repeated", [False, True])
def test_all_small_layouts(page_size: int, repeated: bool) -> None:
    """Up to 3 sequences of 0 to 5 new and cached tokens, against the graph as it was written."""
    old, new = graph_of(page_size, all_raw(repeated)), graph_of(page_size, all_raw(repeated))
    rewrite(new)
    for q in product(range(6), repeat=3):
        c = [(sum(q) + 5 * place) % 6 for place in range(3)]
        layout = make_batch(list(zip(q, c, strict=True)), page_size=page_size).layout()
        x = torch.zeros(sum(q) + (0 if repeated else 2))
        wants, gots = old(layout, x), new(layout, x)
        for want, got in zip(wants, gots, strict=True):
            assert want.dtype == got.dtype
            assert torch.equal(want, got)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 200)), min_size=2, max_size=12),
    st.sampled_from(PAGES),
    st.integers(0, 3),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_larger_layouts(lengths: list[tuple[int, int]], page_size: int, rows: int, tokens: int) -> None:
    """Ragged batches with padding rows and padding tokens, against the fields."""
    batch = make_batch(lengths, page_size=page_size, padding_rows=rows, padding_tokens=tokens)
    gm = graph_of(page_size, all_raw(repeated=False))
    wants = all_fields(batch.layout(), batch.num_tokens, page_size, repeated=False)
    gots = gm(batch.layout(), torch.zeros(batch.num_tokens))[1:]
    for want, got in zip(wants, gots, strict=True):
        assert want.dtype == got.dtype
        assert torch.equal(want, got)


def test_two_backends_share_one_field() -> None:
    def write(layout: Any, T: Any, p: int) -> Any:
        one = (fields.last_page_len(layout, p), fields.kv_page_indptr(layout, p), fields.token_to_seq(layout, T))
        starts = torch.cat([layout.new_zeros(1, dtype=INT32), q_of(layout).cumsum(0, dtype=INT32)])
        s = c_of(layout) + starts.diff()
        rows = torch.repeat_interleave(torch.arange(layout.shape[0], dtype=INT32), starts.diff(), output_size=T)
        return doubled(*one, last_by_where(s, p), sums(-(-s // p)), rows)

    gm = graph_of(16, write)
    rewrite(gm)
    used = [node.target for node in gm.graph.nodes if fields.is_field(node.target)]
    assert sorted(fields.of_op(target).name for target in used) == [
        "has_initial_state",
        "kv_page_indptr",
        "last_page_len",
        "token_to_seq",
    ]


def test_a_search_that_may_meet_padding_is_not_the_field() -> None:
    gm = graph_of(16, lambda layout, T, p: doubled(search(layout, T)))
    rewrite(gm)
    assert fields.token_to_seq not in {node.target for node in gm.graph.nodes}
    layout = make_batch([(2, 0), (1, 3)]).layout()
    assert gm(layout, torch.zeros(5))[1].tolist() == [0, 0, 2, 4, 4]


def test_a_foreign_input_has_no_columns() -> None:
    graph = fx.Graph()
    layout = graph.placeholder("layout")
    layout.meta[ROLE] = "layout"
    output = graph.output(None)
    output.args = (record(output, lambda layout: doubled(q_of(layout), sums(q_of(layout))), layout),)
    gm = fx.GraphModule({}, graph)
    before = str(gm.graph)
    rewrite(gm)
    assert "query_lens" not in str(gm.graph)
    assert "autodeploy_field" not in before + str(gm.graph)
