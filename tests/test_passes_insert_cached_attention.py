"""`insert_cached_attention`: canonical nodes become their backends' cached ops, with metadata of their own each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spans import FULL
from tiny_models import MODEL_TYPES, WINDOW
from torch import Tensor
from traces import apply, before, text, traced

import autodeploy as ad
from autodeploy.errors import OptionError, UnknownName
from autodeploy.graph.dependence import split
from autodeploy.graph.edit import placeholders, take_near_misses
from autodeploy.graph.meta import CACHE_SPECS, LAYOUT_SPEC, SITE
from autodeploy.kernels import registry
from autodeploy.metadata import fields
from autodeploy.metadata.span import Span, Window
from autodeploy.ops.cache import Cache
from autodeploy.ops.kinds import kind_of
from autodeploy.ops.kinds.attention import PagedAttention
from autodeploy.ops.site import Site
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


class OwnToken(PagedAttention):
    """Attention of each token to itself alone, which needs no cache."""

    name = "own_token"

    def caches(self, site: Site) -> tuple[Cache, ...]:
        return ()

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        return {"is_token": fields.is_token(layout, num_tokens)}

    def attend(self, tensors: tuple[Any, ...], caches: tuple[Any, ...], metadata: dict[str, Any], site: Site) -> Tensor:
        group_size = site.facts.num_heads // site.facts.num_kv_heads
        value_BHTD = torch.ops.aten.repeat_interleave.self_int(tensors[2], group_size, 1)
        value_BTHD = torch.ops.aten.transpose.int(value_BHTD, 1, 2)
        return torch.ops.aten.mul.Tensor(value_BTHD, metadata["is_token"][:, None, None])


def test_a_backend_without_a_cache_is_an_attention_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_added", {})
    registry.register_backend(OwnToken())
    result = ad.apply(traced("llama"), backend="own_token")
    assert result.report.ledger.attention_nodes == NUM_LAYERS
    assert result.cache_specs == ()
    assert result.layout_spec.num_groups == 0


def test_layers_that_share_keys_and_values_own_one_cache() -> None:
    """The last two of four layers read what the first two write."""
    result = ad.apply(traced("gemma4_text"), backend="reference", verify=True)
    append = torch.ops.autodeploy.reference_append.default
    written = [node.args[1].name for node in result.module.graph.find_nodes(op="call_function", target=append)]
    assert written == [cache.name for cache in result.cache_specs] == ["key_0", "value_0", "key_1", "value_1"]
    assert result.report.ledger.attention_nodes == NUM_LAYERS
