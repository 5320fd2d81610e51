"""`autodeploy::lightning_indexer`: which of the tokens up to it each token attends to.

As in DeepSeek-V3.2 (arXiv 2512.02556). A key of its own is cached for each token, far smaller than what attention
caches; all of them are scored, and the best are chosen.

Shapes: B batch, H heads of the indexer, S tokens, D size of its keys, X how many are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, Paged
from autodeploy.ops.kind import Kind
from autodeploy.ops.site import Site, path_of, recorded

# Positions are equal or not. Scores that differ by rounding alone may change places.
TOLERANCES = dict.fromkeys((torch.float32, torch.float64, torch.float16, torch.bfloat16), (0.0, 0.0))


@torch.library.custom_op("autodeploy::lightning_indexer", mutates_args=())
def lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    num_chosen: int,
    scale: float = 1.0,
) -> Tensor:
    """The `num_chosen` positions j <= i of most Σ_h weights[b, i, h] · relu(query[b, i, h] · key[b, j] · scale).

    query [B, S, H, D], key [B, S, D], weights [B, S, H] -> [B, S, X] int32, in rising order, then -1 where there are
    fewer. Scores are float32. `cu_seqlens` [N + 1] int32 cuts one packed row (B = 1) into N sequences, whose positions
    begin at 0; tokens after the last are padding, for which nothing is chosen.
    """
    if cu_seqlens is None:
        return choose(query, key, weights, num_chosen, scale)
    chosen_SX = query.new_full((query.shape[1], num_chosen), -1, dtype=torch.int32)
    for start, stop in pairwise(cu_seqlens.tolist()):
        if start < stop:
            own_query, own_key, own_weights = (tensor[:, start:stop] for tensor in (query, key, weights))
            chosen_SX[start:stop] = choose(own_query, own_key, own_weights, num_chosen, scale)[0]
    return chosen_SX[None]


@lightning_indexer.register_fake
def _(query, key, weights, cu_seqlens=None, *, num_chosen, scale=1.0):
    return query.new_empty((*query.shape[:2], num_chosen), dtype=torch.int32)


def choose(query_BQHD: Tensor, key_BSD: Tensor, weights_BQH: Tensor, num_chosen: int, scale: float) -> Tensor:
    """[B, Q, X] int32 for the last Q of S tokens."""
    num_queries, num_keys = query_BQHD.shape[1], key_BSD.shape[1]
    index_S = torch.arange(num_keys, device=key_BSD.device)
    is_later_QS = index_S > index_S[num_keys - num_queries :, None]
    scores_BQS = index_scores(query_BQHD, key_BSD, weights_BQH, scale).masked_fill(is_later_QS, -torch.inf)
    score_BQX, place_BQX = scores_BQS.topk(min(num_chosen, num_keys), dim=-1)
    place_BQX = torch.where(score_BQX > -torch.inf, place_BQX, num_keys).sort(dim=-1).values
    place_BQX = torch.where(place_BQX == num_keys, -1, place_BQX).to(torch.int32)
    return F.pad(place_BQX, (0, num_chosen - place_BQX.shape[2]), value=-1)


def index_scores(query_BQHD: Tensor, key_BSD: Tensor, weights_BQH: Tensor, scale: float) -> Tensor:
    """[B, Q, S] float32, in the arithmetic of transformers' indexers."""
    scores_BQHS = torch.matmul(query_BQHD.float(), key_BSD.transpose(-1, -2).float().unsqueeze(1)) * scale
    return torch.matmul(weights_BQH.float().unsqueeze(-2), F.relu(scores_BQHS)).squeeze(-2)


@dataclass(frozen=True)
class IndexerFacts:
    """What a backend may ask about one indexer: H, D and X of above."""

    num_heads: int
    key_dim: int
    num_chosen: int
    scale: float = 1.0


class LightningIndexer(Kind[IndexerFacts]):
    name = "lightning_indexer"
    meaning = "chooses the keys that sparse attention sees"
    op = torch.ops.autodeploy.lightning_indexer.default
    layer_types = ("sparse_attention",)
    tolerances = TOLERANCES
    token_dims = (1, 1, 1)
    result_dim = 1

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """query, key, weights."""
        return tuple(node.args[:3])

    def describe(self, node: fx.Node) -> Site[IndexerFacts]:
        query, key, _ = recorded(node, *self.tensors(node))
        asked: dict[str, Any] = {name: arg for name, arg in node.kwargs.items() if name in ("num_chosen", "scale")}
        facts = IndexerFacts(int(query.shape[2]), int(query.shape[3]), **asked)
        return Site(self.name, path_of(node), "sparse_attention", key.dtype, key.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[IndexerFacts]:
        facts = IndexerFacts(num_heads=4, key_dim=32, num_chosen=64)
        return Site(self.name, "plain layer", "sparse_attention", dtype, device, facts, page_size=16)

    def operands(self, site: Site[IndexerFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        shapes = ((f.num_heads, f.key_dim), (f.key_dim,), (f.num_heads,))
        return tuple(torch.randn(1, num_tokens, *shape).to(site.device, site.dtype) for shape in shapes)

    def run(self, tensors: tuple[Any, ...], site: Site[IndexerFacts]) -> Tensor:
        return lightning_indexer(*tensors, num_chosen=site.facts.num_chosen, scale=site.facts.scale)

    def appended(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tensors[1:2]


@torch.library.custom_op("autodeploy::indexer_append", mutates_args=("cache",))
def indexer_append(key: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write new keys [1, T, D] to their slots of a cache [pages, p, D]; padding goes to page 0."""
    cache.flatten(0, 1)[slot_mapping] = key[0]


@torch.library.custom_op("autodeploy::reference_paged_indexer", mutates_args=())
def reference_paged_indexer(
    query: Tensor,
    weights: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    num_chosen: int,
    scale: float = 1.0,
) -> Tensor:
    """Score each sequence, whose new keys are cached, by itself.

    query [1, T, H, D], weights [1, T, H], cache [pages, p, D] -> [1, T, X] int32, -1 for padding tokens.
    """
    chosen_TX = query.new_full((query.shape[1], num_chosen), -1, dtype=torch.int32)
    starts, page_size = cu_seqlens_q.tolist(), cache.shape[1]
    for row, seq_len in enumerate(seq_lens.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.start < tokens.stop:
            index_L = torch.arange(seq_len, device=query.device)
            slot_L = block_table[row, index_L // page_size] * page_size + index_L % page_size
            key_1LD = cache.flatten(0, 1)[slot_L][None]
            chosen_TX[tokens] = choose(query[:, tokens], key_1LD, weights[:, tokens], num_chosen, scale)[0]
    return chosen_TX[None]


@reference_paged_indexer.register_fake
def _(query, *_, num_chosen, **__):
    return query.new_empty((*query.shape[:2], num_chosen), dtype=torch.int32)


class ReferenceLightningIndexer(Backend[IndexerFacts]):
    name = "reference"
    kind = "lightning_indexer"
    meaning = "the oracle: scores one sequence after another"

    def why_not(self, site: Site[IndexerFacts]) -> str | None:
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[IndexerFacts]) -> tuple[Cache, ...]:
        """One key [D] for each token."""
        return (Paged("index_key", (site.facts.key_dim,), site.dtype, site.group),)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[IndexerFacts]) -> dict[str, Tensor]:
        pages = (site.group, site.num_groups)
        return {
            "block_table": fields.block_table(layout, *pages),
            "seq_lens": fields.seq_lens(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
            "slot_mapping": fields.slot_mapping(layout, num_tokens, *pages, site.page_size),
        }

    def append(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> None:
        torch.ops.autodeploy.indexer_append.default(tensors[1], *caches, metadata["slot_mapping"])

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        query, _, weights = tensors
        rows = (metadata[name] for name in ("block_table", "seq_lens", "cu_seqlens_q"))
        return torch.ops.autodeploy.reference_paged_indexer.default(
            query, weights, *caches, *rows, num_chosen=site.facts.num_chosen, scale=site.facts.scale
        )


_REFERENCE = ReferenceLightningIndexer()
KIND = LightningIndexer()
