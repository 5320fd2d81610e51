"""`autodeploy::mlstm`: the matrix memory of xLSTM, with exponential gates (arXiv 2405.04517).

Each head keeps a map from keys to values C [D, E], the sum of its keys n [D], both over exp(m), the largest exponent:

    m[t] = max(logsigmoid(forget[t]) + m[t - 1], input[t])
    f = exp(logsigmoid(forget[t]) + m[t - 1] - m[t]),  i = exp(input[t] - m[t])
    C[t] = f C[t - 1] + i key[t] ⊗ value[t],  n[t] = f n[t - 1] + i key[t]
    out[t] = q C[t] / (max(|q n[t]|, exp(-m[t])) + eps)        q = query[t] / sqrt(D)

xLSTM computes 64 tokens at once where there are as many, and the rest so; here all are computed so.

Shapes: B batch, H heads, S tokens, D key size, E value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from autodeploy.errors import UnsupportedFeature
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, State
from autodeploy.ops.kind import Door, Kind
from autodeploy.ops.site import Site, path_of, recorded
from autodeploy.ops.step_kind import MIXED, StepKind
from autodeploy.ops.token_steps import load_states, run_rows, run_steps

# (atol, rtol) of a backend against the canonical op: the same arithmetic, in float32; float16 keeps 11 bits of the
# result and bfloat16 8.
TOLERANCES = {
    torch.float32: (1e-6, 1e-5),
    torch.float64: (1e-6, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


@torch.library.custom_op("autodeploy::mlstm", mutates_args=())
def mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """query and key [B, H, S, D], value [B, H, S, E], gates [B, H, S] before their functions -> [B, H, S, E], in
    float32 but for the result, which has query's dtype.

    `cu_seqlens` [N + 1] int32 cuts one packed row (B = 1) into N sequences that do not see each other.
    """
    tokens = [tensor.transpose(1, 2) for tensor in (query, key, value, input_gate, forget_gate)]
    out = run_rows(partial(_step, eps), tokens, _empty(key, value), cu_seqlens)
    return out.transpose(1, 2).to(query.dtype).contiguous()


@mlstm.register_fake
def _(query, key, value, *_, **__):
    return query.new_empty(value.shape)


def _step(eps: float, tokens: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One token of N sequences, [N, H, ...], from their memories C [N, H, D, E], n [N, H, D] and m [N, H]."""
    query, key, value, input_gate, forget_gate = (tensor.float() for tensor in tokens)
    memory, keys, largest = states
    kept = F.logsigmoid(forget_gate) + largest
    most = torch.maximum(kept, input_gate)
    forget, add = torch.exp(kept - most)[..., None], torch.exp(input_gate - most)[..., None]
    memory = forget[..., None] * memory + (add * key)[..., None] * value[..., None, :]
    keys = forget * keys + add * key
    query = (query * key.shape[-1] ** -0.5)[..., None, :]
    scale = torch.maximum((query @ keys[..., None])[..., 0].abs(), torch.exp(-most)[..., None]) + eps
    return (query @ memory)[..., 0, :] / scale, [memory, keys, most]


def _empty(key: Tensor, value: Tensor) -> list[Tensor]:
    heads, key_dim, value_dim = key.shape[1], key.shape[3], value.shape[3]
    shapes = ((heads, key_dim, value_dim), (heads, key_dim), (heads,))
    return [torch.zeros(shape, device=key.device) for shape in shapes]


@dataclass(frozen=True)
class MlstmFacts:
    """What a backend may ask about one layer."""

    num_heads: int
    key_dim: int
    value_dim: int
    eps: float


def _backend_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool | None = None,
    mode: str | None = None,
) -> tuple[Tensor, None]:
    """In place of xLSTM's own in inference, whose state is None where none is kept."""
    if any(state is not None for state in (c_initial, n_initial, m_initial)):
        raise UnsupportedFeature("a state that the model keeps itself", where=type(module).__name__)
    if "inference" not in (mode or module.config.mode):
        raise UnsupportedFeature(
            "an mLSTM in training mode", where=type(module).__name__, fix='config.mode = "inference"'
        )
    return mlstm(query, key, value, igate, fgate, eps=module.config.eps), None


class Mlstm(Kind[MlstmFacts]):
    name = "mlstm"
    meaning = "matrix memory of xLSTM with exponential gates"
    op = torch.ops.autodeploy.mlstm.default
    layer_types = ("linear_attention",)
    tolerances = TOLERANCES
    token_dims = (2, 2, 2, 2, 2)
    result_dim = 2
    doors = (Door("forward", _backend_forward, owner="xLSTMBackend"),)

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """query, key, value, input_gate, forget_gate."""
        return node.args[:5]

    def describe(self, node: fx.Node) -> Site[MlstmFacts]:
        key, value = recorded(node, node.args[1], node.args[2])
        eps: Any = node.kwargs.get("eps", 1e-6)
        facts = MlstmFacts(int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), eps)
        return Site(self.name, path_of(node), "linear_attention", key.dtype, key.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[MlstmFacts]:
        facts = MlstmFacts(num_heads=2, key_dim=16, value_dim=16, eps=1e-6)
        return Site(self.name, "plain layer", "linear_attention", dtype, device, facts, page_size=16)

    def operands(self, site: Site[MlstmFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        wide = [torch.randn(1, f.num_heads, num_tokens, size) for size in (f.key_dim, f.key_dim, f.value_dim)]
        tensors = (*wide, *torch.randn(2, 1, f.num_heads, num_tokens))
        return tuple(tensor.to(site.device, site.dtype) for tensor in tensors)

    def run(self, tensors: tuple[Any, ...], site: Site[MlstmFacts]) -> Tensor:
        return mlstm(*tensors, eps=site.facts.eps)


@torch.library.custom_op(
    "autodeploy::reference_cached_mlstm", mutates_args=("memory_cache", "keys_cache", "largest_cache")
)
def reference_cached_mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    memory_cache: Tensor,
    keys_cache: Tensor,
    largest_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    eps: float = 1e-6,
    step_kind: str = MIXED,
) -> Tensor:
    """Tensors as in the canonical op with B = 1, caches [slots, H, D, E], [slots, H, D] and [slots, H] float32
    -> [1, H, T, E], zeros for padding. The int and bool tensors are the fields of the same names.
    """
    kind: StepKind = step_kind  # type: ignore[assignment]
    caches = (memory_cache, keys_cache, largest_cache)
    states = load_states(caches, _empty(key, value), state_slots, has_initial_state)
    tokens = [tensor[0].transpose(0, 1) for tensor in (query, key, value, input_gate, forget_gate)]
    out, after = run_steps(partial(_step, eps), tokens, states, cu_seqlens_q, kind)
    for cache, state in zip(caches, after, strict=True):
        cache[state_slots] = state
    return out.transpose(0, 1)[None].to(query.dtype).contiguous()


@reference_cached_mlstm.register_fake
def _(query, key, value, *_, **__):
    return query.new_empty(value.shape)


class ReferenceMlstm(Backend[MlstmFacts]):
    name = "reference"
    kind = "mlstm"
    meaning = "the oracle: the next token of all sequences, one after another"

    def why_not(self, site: Site[MlstmFacts]) -> str | None:
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[MlstmFacts]) -> tuple[Cache, ...]:
        f = site.facts
        shapes = {"memory": (f.num_heads, f.key_dim, f.value_dim), "keys": (f.num_heads, f.key_dim)}
        shapes["largest"] = (f.num_heads,)
        return tuple(State(f"mlstm_{name}", shape, torch.float32) for name, shape in shapes.items())

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[MlstmFacts]) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.reference_cached_mlstm.default(*tensors, *caches, **metadata, eps=site.facts.eps)


_REFERENCE = ReferenceMlstm()
KIND = Mlstm()
