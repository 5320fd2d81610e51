"""`autodeploy::gated_delta_rule`: linear attention whose state forgets and corrects itself (Qwen3-Next, OLMo hybrid).

Each head keeps S [K, V], a map from keys to values (arXiv 2412.06464; Kimi Linear, arXiv 2510.26692, decays each key
channel by itself):

    S'[t] = exp(decay[t]) · S[t - 1]
    S[t]  = S'[t] + key[t] ⊗ beta[t] · (value[t] - key[t] · S'[t])
    out[t] = query[t] · S[t] / sqrt(K)

Sequences are computed in chunks, as the models' own functions do; these begin at the first token of each call.

Shapes: B batch, S tokens, G key heads, H value heads (G divides H), K key size, V value size, L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from autodeploy.errors import UnsupportedFeature
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, State
from autodeploy.ops.kind import Door, Kind
from autodeploy.ops.site import Site, path_of, recorded

# (atol, rtol) of a backend against the canonical op: all compute in float32, in chunks that begin elsewhere, and the
# triangular systems of chunks add up some thousand terms; float16 keeps 11 bits of the result and bfloat16 8.
TOLERANCES = {
    torch.float32: (1e-5, 1e-4),
    torch.float64: (1e-5, 1e-4),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
_EPSILON = 1e-6  # of the norm of queries and keys, in all models
_BLOCK = 16  # rows of a chunk whose decays per channel are multiplied out one by one


@torch.library.custom_op("autodeploy::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int = 64,
    normalize: bool = False,
) -> Tensor:
    """The gated delta rule from an empty state, in float32.

    query, key [B, S, G, K], value [B, S, H, V], decay [B, S, H] or [B, S, H, K] (its logarithm, at most 0),
    beta [B, S, H] -> [B, S, H, V], in query's dtype. `normalize` scales queries and keys to length 1 first.
    `cu_seqlens` [N + 1] int32 cuts one packed row (B = 1) into N sequences that do not see each other.
    """
    inputs = prepare((query, key, value, decay, beta), normalize)
    bounds = [0, query.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    out = torch.zeros_like(inputs.value)
    for start, stop in pairwise(bounds):
        if start < stop:
            out[:, start:stop] = run_chunks(
                inputs.at(slice(None), slice(start, stop)), inputs.empty_state(), chunk_size
            )[0]
    return out.to(query.dtype)


@gated_delta_rule.register_fake
def _(query, key, value, decay, beta, cu_seqlens=None, *, chunk_size=64, normalize=False):
    return query.new_empty(value.shape)


class Inputs(NamedTuple):
    """Everything in float32 and of H heads: [..., H, K or V], beta [..., H, 1], decay [..., H, 1 or K]."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor

    def at(self, *index: Any) -> Inputs:
        """Those of some tokens."""
        return Inputs(*(tensor[index] for tensor in self))

    def empty_state(self) -> Tensor:
        """[B, H, K, V] for inputs [B, S, H, ...]."""
        return self.value.new_zeros(len(self.value), *self.key.shape[2:], self.value.shape[-1])


def prepare(tensors: tuple[Tensor, ...], normalize: bool) -> Inputs:
    """Queries and keys normalised, queries scaled, and both repeated for the value heads that share them."""
    query, key, value, decay, beta = (tensor.float() for tensor in tensors)
    if normalize:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON) for x in (query, key))
    heads = value.shape[-2] // key.shape[-2]
    query, key = (x.repeat_interleave(heads, dim=-2) for x in (query * key.shape[-1] ** -0.5, key))
    return Inputs(query, key, value, decay if decay.dim() == key.dim() else decay[..., None], beta[..., None])


def run_token(token: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each sequence, inputs [N, H, ...], from its state [N, H, K, V]: [N, H, V] and the next state."""
    state = state * token.decay.exp()[..., None]
    change = (token.value - (token.key[..., None, :] @ state)[..., 0, :]) * token.beta
    state = torch.addcmul(state, token.key[..., None], change[..., None, :])
    return (token.query[..., None, :] @ state)[..., 0, :], state


def run_chunk(chunk: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of each sequence, inputs [N, L, H, ...], from its state: [N, L, H, V] and the next state.

    Places without a token, behind the others, are zero in all inputs.
    """
    query, key, value, decay, beta = (tensor.transpose(1, 2).contiguous() for tensor in chunk)
    total = decay.cumsum(2)
    end = total[:, :, -1:]
    system, scores = _scores((key * beta, query), key, total)
    # The corrections of a chunk's tokens depend on one another: a unitriangular system (UT transform).
    target = torch.cat([value, key * total.exp()], dim=-1) * beta
    solved = torch.linalg.solve_triangular(system, target, upper=False, unitriangular=True)
    written, read = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    change = written - read @ state
    out = query * total.exp() @ state + scores.tril() @ change
    return out.transpose(1, 2), state * end.exp().mT + (key * (end - total).exp()).mT @ change


def _scores(queries: tuple[Tensor, ...], key: Tensor, total: Tensor) -> Sequence[Tensor]:
    """For each of `queries`: Σ_k query[i, k] · key[j, k] · exp(total[i, k] - total[j, k]) where i >= j, anything above.

    All are [N, H, L, K], `total` [N, H, L, 1 or K] -> [N, H, L, L]. A decay per channel is no factor of a score: it is
    split at the first row of a block, so that no exponent is positive, and multiplied out within the block.
    """
    if total.shape[-1] == 1:
        weight = (total - total.mT).clamp(max=0).exp()
        return [query @ key.mT * weight for query in queries]
    query = torch.stack(queries, dim=3)
    scores = torch.zeros(*query.shape[:4], key.shape[2], device=key.device)
    for start in range(0, key.shape[2], _BLOCK):
        rows = slice(start, start + _BLOCK)
        first, own = total[:, :, start : start + 1], total[:, :, rows]
        left = (query[:, :, rows] * (own - first).exp()[:, :, :, None]).flatten(2, 3)
        before = key[:, :, :start] * (first - total[:, :, :start]).exp()
        scores[:, :, rows, :, :start] = (left @ before.mT).unflatten(2, (-1, len(queries)))
        pairs = (own[:, :, :, None] - own[:, :, None]).clamp(max=0).exp() * key[:, :, None, rows]
        scores[:, :, rows, :, rows] = query[:, :, rows] @ pairs.mT
    return scores.unbind(3)


def run_chunks(inputs: Inputs, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Sequences of the same length, inputs [B, S, H, ...], from their states [B, H, K, V]: [B, S, H, V] and states."""
    length, outs = inputs.value.shape[1], []
    for start in range(0, length, chunk_size):
        out, state = run_chunk(inputs.at(slice(None), slice(start, start + chunk_size)), state)
        outs.append(out)
    return torch.cat(outs, dim=1), state


@dataclass(frozen=True)
class DeltaFacts:
    """What a backend may ask about one layer; `has_channel_decays` where each key channel decays by itself."""

    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    chunk_size: int = 64
    normalize: bool = True
    has_channel_decays: bool = False


def _door(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What modeling files call under the names below, as they do the functions of the package flash-linear-attention.

    The state that they may ask for is None: what is traced has no cache to keep it in.
    """
    refused = {"packed sequences (cu_seqlens)": cu_seqlens, "an initial state": initial_state, "another scale": scale}
    for what, given in refused.items():
        if given is not None:
            raise UnsupportedFeature(f"{what} in a gated delta rule", where="gated_delta_rule")
    out = gated_delta_rule(query, key, value, g, beta, chunk_size=chunk_size, normalize=use_qk_l2norm_in_kernel)
    return out, None


_DOORS = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
    "chunk_kda",
    "fused_recurrent_kda",
)


class GatedDeltaRule(Kind[DeltaFacts]):
    name = "gated_delta_rule"
    meaning = "linear attention by the gated delta rule, with a decay per head or per key channel"
    op = torch.ops.autodeploy.gated_delta_rule.default
    layer_types = ("linear_attention",)
    tolerances = TOLERANCES
    token_dims = (1, 1, 1, 1, 1)
    result_dim = 1
    doors = tuple(Door(name, _door) for name in _DOORS)

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """query, key, value, decay, beta."""
        return node.args[:5]

    def describe(self, node: fx.Node) -> Site[DeltaFacts]:
        query, value, decay = recorded(node, node.args[0], node.args[2], node.args[3])
        chunk_size: Any = node.kwargs.get("chunk_size", 64)
        facts = DeltaFacts(
            *map(int, (query.shape[2], value.shape[2], query.shape[3], value.shape[3], chunk_size)),
            normalize=bool(node.kwargs.get("normalize")),
            has_channel_decays=decay.dim() == query.dim(),
        )
        return Site(self.name, path_of(node), "linear_attention", query.dtype, query.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[DeltaFacts]:
        facts = DeltaFacts(num_key_heads=2, num_heads=4, key_dim=16, value_dim=16)
        return Site(self.name, "plain layer", "linear_attention", dtype, device, facts, page_size=16)

    def operands(self, site: Site[DeltaFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        # Keys of length 1: those that a layer does not normalise would make the state grow without bound.
        query, key = (F.normalize(torch.randn(1, num_tokens, f.num_key_heads, f.key_dim), dim=-1) for _ in range(2))
        value = torch.randn(1, num_tokens, f.num_heads, f.value_dim)
        channels = (f.key_dim,) if f.has_channel_decays else ()
        decay = -F.softplus(torch.randn(1, num_tokens, f.num_heads, *channels))
        beta = torch.rand(1, num_tokens, f.num_heads)
        query, key, value, beta = (tensor.to(site.device, site.dtype) for tensor in (query, key, value, beta))
        return query, key, value, decay.to(site.device), beta

    def run(self, tensors: tuple[Any, ...], site: Site[DeltaFacts]) -> Tensor:
        return gated_delta_rule(*tensors, chunk_size=site.facts.chunk_size, normalize=site.facts.normalize)


class CachedDeltaRule(Backend[DeltaFacts]):
    """What all backends of the delta rule have in common: they cache the state S of each sequence, in float32."""

    kind = "gated_delta_rule"

    def why_not(self, site: Site[DeltaFacts]) -> str | None:
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[DeltaFacts]) -> tuple[Cache, ...]:
        f = site.facts
        return (State("delta_state", (f.num_heads, f.key_dim, f.value_dim), torch.float32),)


@torch.library.custom_op("autodeploy::reference_cached_gated_delta_rule", mutates_args=("state_cache",))
def reference_cached_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    chunk_size: int,
    normalize: bool,
) -> Tensor:
    """Advance each sequence's state by its new tokens, one after another as a step of many sequences would not.

    Tensors as in the canonical op with B = 1, state_cache [slots, H, K, V] float32 -> [1, T, H, V], zeros for padding
    tokens. The int and bool tensors are the fields of the same names.
    """
    inputs = prepare((query, key, value, decay, beta), normalize)
    out = torch.zeros_like(inputs.value)
    starts = cu_seqlens_q.tolist()
    for row, (slot, goes_on) in enumerate(zip(state_slots.tolist(), has_initial_state.tolist(), strict=True)):
        state = state_cache[slot][None] if goes_on else inputs.empty_state()
        for token in range(starts[row], starts[row + 1]):
            out[:, token], state = run_token(inputs.at(slice(None), token), state)
        if starts[row] < starts[row + 1]:
            state_cache[slot] = state[0]
    return out.to(query.dtype)


@reference_cached_gated_delta_rule.register_fake
def _(query, key, value, *_, **__):
    return query.new_empty(value.shape)


class ReferenceDeltaRule(CachedDeltaRule):
    name = "reference"
    meaning = "the oracle: one sequence after another, token by token"

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[DeltaFacts]) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.reference_cached_gated_delta_rule.default(
            *tensors, *caches, **metadata, chunk_size=site.facts.chunk_size, normalize=site.facts.normalize
        )


_REFERENCE = ReferenceDeltaRule()
KIND = GatedDeltaRule()
