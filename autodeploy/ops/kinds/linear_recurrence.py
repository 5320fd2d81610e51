"""`autodeploy::linear_recurrence`: a state per channel that decays and adds (RG-LRU of Griffin and RecurrentGemma).

    h[t] = decay[t] · h[t - 1] + hidden[t]

for each channel by itself, in float32 (arXiv 2402.19427). What the decays and inputs are made of stays in the graph.

Shapes: B batch, S tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.errors import UnsupportedFeature
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, State
from autodeploy.ops.kind import Door, Kind
from autodeploy.ops.site import Site, path_of, recorded

# (atol, rtol) of a backend against the canonical op: all add in the same order, in float32; float16 keeps 11 bits of
# the result and bfloat16 8.
TOLERANCES = {
    torch.float32: (1e-6, 1e-6),
    torch.float64: (1e-6, 1e-6),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


@torch.library.custom_op("autodeploy::linear_recurrence", mutates_args=())
def linear_recurrence(hidden: Tensor, decay: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """h[t] = decay[t] · h[t - 1] + hidden[t] from h = 0.

    hidden and decay [B, S, C] -> [B, S, C] in hidden's dtype. `cu_seqlens` [N + 1] int32 cuts one packed row (B = 1)
    into N sequences that do not see each other.
    """
    bounds = [0, hidden.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    states = hidden.float().clone()
    for start, stop in pairwise(bounds):
        run(states[:, start:stop].unbind(1), decay[:, start:stop].unbind(1), None)
    return states.to(hidden.dtype)


@linear_recurrence.register_fake
def _(hidden, decay, cu_seqlens=None):
    return torch.empty_like(hidden)


def run(states: tuple[Tensor, ...], decays: tuple[Tensor, ...], before: Tensor | None) -> None:
    """Advance from the state `before` the first token: `states`, one of each token, hold its input and then its state.

    All are [..., C], states in float32.
    """
    for state, decay in zip(states, decays, strict=True):
        before = state if before is None else state.addcmul_(decay.float(), before)


@dataclass(frozen=True)
class RecurrenceFacts:
    """What a backend may ask about one layer."""

    channels: int


def _rnn_scan(
    module: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, None]:
    """In place of RecurrentGemma's: `reset` [B, S, 1] begins again with the token's own input.

    The next state is None, which the layer keeps as "none yet".
    """
    if recurrent_states is not None or acc_dtype is not torch.float32:
        raise UnsupportedFeature("a recurrence from a given state, or not in float32", where=type(module).__name__)
    return linear_recurrence(hidden_states, recurrent_gate * ~reset), None


class LinearRecurrence(Kind[RecurrenceFacts]):
    name = "linear_recurrence"
    meaning = "linear recurrence with a decay per token and channel"
    op = torch.ops.autodeploy.linear_recurrence.default
    layer_types = ("linear_attention",)
    tolerances = TOLERANCES
    token_dims = (1, 1)
    result_dim = 1
    doors = (Door("_rnn_scan", _rnn_scan, owner="RecurrentGemmaRglru"),)

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """hidden, decay."""
        return node.args[:2]

    def describe(self, node: fx.Node) -> Site[RecurrenceFacts]:
        (hidden,) = recorded(node, node.args[0])
        facts = RecurrenceFacts(int(hidden.shape[2]))
        return Site(self.name, path_of(node), "linear_attention", hidden.dtype, hidden.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[RecurrenceFacts]:
        return Site(self.name, "plain layer", "linear_attention", dtype, device, RecurrenceFacts(64), page_size=16)

    def operands(self, site: Site[RecurrenceFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        shape = (1, num_tokens, site.facts.channels)
        hidden, decay = torch.randn(shape), torch.rand(shape)
        return hidden.to(site.device, site.dtype), decay.to(site.device, site.dtype)

    def run(self, tensors: tuple[Any, ...], site: Site[RecurrenceFacts]) -> Tensor:
        return linear_recurrence(*tensors)


class CachedRecurrence(Backend[RecurrenceFacts]):
    """What all backends of the recurrence have in common: they cache the state of each sequence, in float32."""

    kind = "linear_recurrence"

    def why_not(self, site: Site[RecurrenceFacts]) -> str | None:
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[RecurrenceFacts]) -> tuple[Cache, ...]:
        return (State("recurrent_state", (site.facts.channels,), torch.float32),)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[RecurrenceFacts]) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }


@torch.library.custom_op("autodeploy::reference_cached_linear_recurrence", mutates_args=("state_cache",))
def reference_cached_linear_recurrence(
    hidden: Tensor,
    decay: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
) -> Tensor:
    """Advance each sequence's state by its new tokens, one sequence after another.

    hidden and decay [1, T, C], state_cache [slots, C] float32 -> [1, T, C], noise for padding tokens. The int and bool
    tensors are the fields of the same names.
    """
    states_TC = hidden[0].float().clone()
    starts = cu_seqlens_q.tolist()
    for row, (slot, goes_on) in enumerate(zip(state_slots.tolist(), has_initial_state.tolist(), strict=True)):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.start < tokens.stop:
            run(states_TC[tokens].unbind(0), decay[0, tokens].unbind(0), state_cache[slot] if goes_on else None)
            state_cache[slot] = states_TC[tokens.stop - 1]
    return states_TC[None].to(hidden.dtype)


@reference_cached_linear_recurrence.register_fake
def _(hidden, *_):
    return torch.empty_like(hidden)


class ReferenceRecurrence(CachedRecurrence):
    name = "reference"
    meaning = "the oracle: one sequence after another, token by token"

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.reference_cached_linear_recurrence.default(*tensors, *caches, **metadata)


_REFERENCE = ReferenceRecurrence()
KIND = LinearRecurrence()
