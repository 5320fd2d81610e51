"""`insert_cached_attention`: canonical nodes become their backends' cached ops, with metadata of their own each."""

from __future__ import annotations

import pytest
from spans import FULL
from tiny_models import MODEL_TYPES, WINDOW
from traces import apply, before, text

from autodeploy.errors import OptionError, UnknownName
from autodeploy.graph.dependence import split
from autodeploy.graph.edit import placeholders, take_near_misses
from autodeploy.graph.meta import CACHE_SPECS, LAYOUT_SPEC, SITE
from autodeploy.metadata.span import Span, Window
from autodeploy.ops.kinds import kind_of
from passes import InsertCachedAttention

NUM_LAYERS = 4


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_layer_gets_its_caches(model_type: str, backend: str) -> None:
    gm = before("insert_cached_attention", model_type)
    assert apply(InsertCachedAttention(backend), gm) == NUM_LAYERS
    assert not [node for node in gm.graph.nodes if kind_of(node.target) is not None]
    assert [node.name for node in placeholders(gm, "cache")] == [spec.name for spec in CACHE_SPECS.of(gm)]
    assert len({SITE.of(node).path for node in gm.graph.nodes if SITE.on(node)}) == NUM_LAYERS


@pytest.mark.parametrize(
    ("model_type", "spans", "has_state"),
    [
        ("llama", (FULL,), False),
        ("mistral", (Window(WINDOW),), False),
        ("gemma2", (Window(WINDOW), FULL), False),
        ("lfm2", (FULL,), True),
    ],
)
def test_layers_of_one_span_share_a_group(model_type: str, spans: tuple[Span, ...], has_state: bool) -> None:
    gm = before("insert_cached_attention", model_type)
    InsertCachedAttention(page_size=8).apply(gm)
    spec = LAYOUT_SPEC.of(gm)
    assert (spec.page_size, spec.spans, spec.has_state) == (8, spans, has_state)
    paged = [SITE.of(node) for node in gm.graph.nodes if SITE.on(node) and SITE.of(node).kind == "attention"]
    assert all(spec.spans[site.group] == site.span for site in paged)


def test_metadata_is_written_once_per_layer() -> None:
    gm = before("insert_cached_attention")
    shared = len(split(gm).metadata)
    InsertCachedAttention().apply(gm)
    per_layer, rest = divmod(
        len(split(gm).metadata) - shared + 1, NUM_LAYERS
    )  # cu_seqlens of the canonical ops is gone
    assert per_layer > 0
    assert rest in range(NUM_LAYERS)


def test_options_are_checked_before_anything_changes() -> None:
    gm = before("insert_cached_attention")
    graph = text(gm)
    with pytest.raises(OptionError, match="page_size is 0"):
        InsertCachedAttention(page_size=0).apply(gm)
    with pytest.raises(UnknownName, match="unknown backend 'referense'") as caught:
        InsertCachedAttention({"full_attention": "referense"}).apply(gm)
    assert "did you mean 'reference'? known:" in caught.value.fix
    assert text(gm) == graph


def test_padded_inputs_are_a_near_miss() -> None:
    gm = before("nest_inputs")
    assert InsertCachedAttention().apply(gm) == 0
    reasons = [reason for _, reason in take_near_misses(gm)]
    assert reasons == ["the graph has no packed inputs; nest_inputs comes first"] * NUM_LAYERS
