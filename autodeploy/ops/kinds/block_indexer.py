"""`autodeploy::block_indexer`: which blocks of the tokens up to it each token attends to (Qwen4's sparse attention).

The keys of each whole block are averaged, normalised and rotated as the block's first token; each query takes the best
blocks of those that end before or at it, and all tokens behind them. Blocks begin at a sequence's first token.

Shapes: B batch, S tokens, H heads of the indexer, D size of its keys, R rotated size, L tokens of a block, M blocks
that are taken at most, X = M * L + L - 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.errors import UnsupportedFeature
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, Paged
from autodeploy.ops.kind import Door, Kind
from autodeploy.ops.site import Site, path_of, recorded

# Positions are equal or not. Scores that differ by rounding alone may change places.
TOLERANCES = dict.fromkeys((torch.float32, torch.float64, torch.float16, torch.bfloat16), (0.0, 0.0))


@torch.library.custom_op("autodeploy::block_indexer", mutates_args=())
def block_indexer(
    query: Tensor,
    key: Tensor,
    rotary: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    block_size: int,
    num_blocks: int,
    eps: float = 1e-6,
) -> Tensor:
    """The tokens of the `num_blocks` blocks b of most Σ_h relu(query[i, h] · rotated(normed(mean of key in b))).

    query [B, S, H, D] rotated already, key [B, S, D], rotary [B, S, 2, R] (cosines and sines of each token's place),
    weight [D] of the norm, less 1 -> positions [B, S, X] int32, -1 where there are fewer. `cu_seqlens` [N + 1] int32
    cuts one packed row (B = 1) into N sequences, whose positions begin at 0; tokens after the last are padding.
    """
    options = {"block_size": block_size, "num_blocks": num_blocks, "eps": eps}
    batch, length = key.shape[:2]
    size = _num_chosen(block_size, num_blocks)
    chosen = torch.full((batch, length, size), -1, dtype=torch.int32, device=key.device)
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    for row in range(batch):
        for start, stop in pairwise(bounds):
            own, keys, places = (tensor[row, start:stop] for tensor in (query, key, rotary))
            chosen[row, start:stop] = choose(own, keys, places, weight, **options)
    return chosen


@block_indexer.register_fake
def _(query, key, rotary, weight, cu_seqlens=None, *, block_size, num_blocks, eps=1e-6):
    return query.new_empty((*key.shape[:2], _num_chosen(block_size, num_blocks)), dtype=torch.int32)


def _num_chosen(block_size: int, num_blocks: int) -> int:
    return num_blocks * block_size + block_size - 1


def choose(
    query_QHD: Tensor,
    key_SD: Tensor,
    rotary_S2R: Tensor,
    weight_D: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    eps: float,
) -> Tensor:
    """[Q, X] int32 for the last Q of S tokens of one sequence."""
    num_tokens, num_queries = len(key_SD), len(query_QHD)
    whole = num_tokens // block_size
    pooled_MD = key_SD[: whole * block_size].unflatten(0, (whole, block_size)).float().mean(1).to(key_SD.dtype)
    block_MD = _rotated(_normed(pooled_MD, weight_D, eps), rotary_S2R[: whole * block_size : block_size])
    scores_QHM = query_QHD.float() @ block_MD.float().mT
    scores_QM = torch.relu(scores_QHM).sum(1) / key_SD.shape[-1] ** 0.5
    chosen_QX = key_SD.new_full((num_queries, _num_chosen(block_size, num_blocks)), -1, dtype=torch.int32)
    offset_L = torch.arange(block_size, device=key_SD.device)
    # Query by query: which of equal scores are taken depends on how many blocks there are.
    for index, position in enumerate(range(num_tokens - num_queries, num_tokens)):
        ended = (position + 1) // block_size
        best_M = scores_QM[index, :ended].topk(min(num_blocks, ended)).indices
        tokens = (best_M[:, None] * block_size + offset_L).flatten()
        rest = torch.arange(ended * block_size, position + 1, device=key_SD.device)
        chosen_QX[index, : len(tokens) + len(rest)] = torch.cat([tokens, rest])
    return chosen_QX


def _normed(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight.float())).to(hidden.dtype)


def _rotated(hidden_MD: Tensor, rotary_M2R: Tensor) -> Tensor:
    cosine, sine = rotary_M2R.unbind(1)
    turned, rest = hidden_MD[:, : cosine.shape[1]], hidden_MD[:, cosine.shape[1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cosine + torch.cat([-second, first], dim=-1) * sine, rest], dim=-1)


@dataclass(frozen=True)
class BlockIndexerFacts:
    """What a backend may ask about one indexer: H, D, R, L and M of above."""

    num_heads: int
    key_dim: int
    rotary_dim: int
    block_size: int
    num_blocks: int
    eps: float = 1e-6

    @property
    def options(self) -> dict[str, Any]:
        """What the ops take by name."""
        return {"block_size": self.block_size, "num_blocks": self.num_blocks, "eps": self.eps}


def _attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In place of Qwen4's, which makes a mask of what is taken; the layer's own arithmetic otherwise."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    indexer = module.indexer
    if past_key_values is not None or indexer.index_kv_heads != 1:
        raise UnsupportedFeature(
            "an indexer with a cache of its own or several heads of keys", where=type(module).__name__
        )
    rotate = vars(sys.modules[type(module).__module__])["apply_rotary_pos_emb"]
    cosine, sine = position_embeddings
    index_query, index_key = (
        indexer.index_qk_proj(hidden_states)
        .unflatten(-1, (-1, indexer.index_head_dim))
        .split([indexer.index_n_heads, 1], dim=2)
    )
    chosen = block_indexer(
        rotate(indexer.q_layernorm(index_query), cos=cosine, sin=sine, unsqueeze_dim=2),
        index_key.squeeze(2),
        torch.stack([cosine, sine], dim=2),
        indexer.k_layernorm.weight,
        block_size=indexer.compress_ratio,
        num_blocks=indexer.block_topk,
        eps=indexer.k_layernorm.eps,
    )
    heads = (*hidden_states.shape[:-1], -1, module.head_dim)
    query, gate = module.q_proj(hidden_states).unflatten(-1, (-1, 2 * module.head_dim)).chunk(2, dim=-1)
    query = module.q_norm(query).transpose(1, 2)
    key = module.k_norm(module.k_proj(hidden_states).view(heads)).transpose(1, 2)
    value = module.v_proj(hidden_states).view(heads).transpose(1, 2)
    query, key = rotate(query, key, cosine, sine)
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out, _ = attend(module, query, key, value, attention_mask, scaling=module.scaling, indices=chosen, **kwargs)
    return module.o_proj(out.flatten(2) * torch.sigmoid(gate.flatten(2))), None


class BlockIndexer(Kind[BlockIndexerFacts]):
    name = "block_indexer"
    meaning = "chooses the blocks of keys that sparse attention sees"
    op = torch.ops.autodeploy.block_indexer.default
    layer_types = ("indexed_attention",)
    tolerances = TOLERANCES
    token_dims = (1, 1, 1, None)
    result_dim = 1
    doors = (Door("forward", _attention_forward, owner="Qwen4ExpTextAttention"),)

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """query, key, rotary, weight."""
        return node.args[:4]

    def describe(self, node: fx.Node) -> Site[BlockIndexerFacts]:
        query, rotary = recorded(node, node.args[0], node.args[2])
        asked: dict[str, Any] = {name: arg for name, arg in node.kwargs.items() if name != "cu_seqlens"}
        facts = BlockIndexerFacts(int(query.shape[2]), int(query.shape[3]), int(rotary.shape[3]), **asked)
        return Site(self.name, path_of(node), self.layer_types[0], query.dtype, query.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[BlockIndexerFacts]:
        facts = BlockIndexerFacts(num_heads=4, key_dim=32, rotary_dim=16, block_size=4, num_blocks=8)
        return Site(self.name, "plain layer", self.layer_types[0], dtype, device, facts, page_size=16)

    def operands(self, site: Site[BlockIndexerFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        shapes = ((1, num_tokens, f.num_heads, f.key_dim), (1, num_tokens, f.key_dim), (1, num_tokens, 2, f.rotary_dim))
        return tuple(torch.randn(shape).to(site.device, site.dtype) for shape in (*shapes, (f.key_dim,)))

    def run(self, tensors: tuple[Any, ...], site: Site[BlockIndexerFacts]) -> Tensor:
        return block_indexer(*tensors, **site.facts.options)


@torch.library.custom_op("autodeploy::block_indexer_append", mutates_args=("key_cache", "rotary_cache"))
def block_indexer_append(
    key: Tensor, rotary: Tensor, key_cache: Tensor, rotary_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write new keys [1, T, D] and rotations [1, T, 2, R] to their slots of caches [pages, p, ...]."""
    for new, cache in ((key, key_cache), (rotary, rotary_cache)):
        cache.flatten(0, 1)[slot_mapping] = new[0]


@torch.library.custom_op("autodeploy::reference_paged_block_indexer", mutates_args=())
def reference_paged_block_indexer(
    query: Tensor,
    weight: Tensor,
    key_cache: Tensor,
    rotary_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    eps: float,
) -> Tensor:
    """Each sequence by itself, whose new keys are cached: query [1, T, H, D] -> [1, T, X] int32, -1 for padding."""
    options = {"block_size": block_size, "num_blocks": num_blocks, "eps": eps}
    chosen_TX = query.new_full((query.shape[1], _num_chosen(block_size, num_blocks)), -1, dtype=torch.int32)
    starts, page_size = cu_seqlens_q.tolist(), key_cache.shape[1]
    for row, seq_len in enumerate(seq_lens.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.start < tokens.stop:
            index_S = torch.arange(seq_len, device=query.device)
            slot_S = block_table[row, index_S // page_size] * page_size + index_S % page_size
            keys, rotary = (cache.flatten(0, 1)[slot_S] for cache in (key_cache, rotary_cache))
            chosen_TX[tokens] = choose(query[0, tokens], keys, rotary, weight, **options)
    return chosen_TX[None]


@reference_paged_block_indexer.register_fake
def _(query, *_, block_size, num_blocks, **__):
    return query.new_empty((*query.shape[:2], _num_chosen(block_size, num_blocks)), dtype=torch.int32)


class ReferenceBlockIndexer(Backend[BlockIndexerFacts]):
    name = "reference"
    kind = "block_indexer"
    meaning = "the oracle: one sequence after another"

    def why_not(self, site: Site[BlockIndexerFacts]) -> str | None:
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[BlockIndexerFacts]) -> tuple[Cache, ...]:
        """A key [D] and a rotation [2, R] for each token."""
        f = site.facts
        key = Paged("index_key", (f.key_dim,), site.dtype, site.group)
        return key, Paged("index_rotary", (2, f.rotary_dim), site.dtype, site.group)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[BlockIndexerFacts]) -> dict[str, Tensor]:
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
        torch.ops.autodeploy.block_indexer_append.default(*tensors[1:3], *caches, metadata["slot_mapping"])

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        query, _, _, weight = tensors
        rows = (metadata[name] for name in ("block_table", "seq_lens", "cu_seqlens_q"))
        return torch.ops.autodeploy.reference_paged_block_indexer.default(
            query, weight, *caches, *rows, **site.facts.options
        )


_REFERENCE = ReferenceBlockIndexer()
KIND = BlockIndexer()
