"""`autodeploy::wkv`: the weighted average of RWKV-4, whose weights decay with distance (arXiv 2305.13048).

For each channel, with w = -exp(time_decay):

    out[t] = (Σ_{i<t} exp((t - 1 - i) w + key[i]) value[i] + exp(time_first + key[t]) value[t])
             / (Σ_{i<t} exp((t - 1 - i) w + key[i]) + exp(time_first + key[t]))

Numerator and denominator are kept over exp of the largest exponent so far.

Shapes: B batch, S tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

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
    torch.float32: (1e-6, 1e-6),
    torch.float64: (1e-6, 1e-6),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
_NEVER = -1e38  # the largest exponent of no token, as in RWKV's own kernels


@torch.library.custom_op("autodeploy::wkv", mutates_args=())
def wkv(key: Tensor, value: Tensor, time_decay: Tensor, time_first: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """key and value [B, S, C], time_decay and time_first [C] -> [B, S, C] in key's dtype; see above.

    `cu_seqlens` [N + 1] int32 cuts one packed row (B = 1) into N sequences that do not see each other.
    """
    step = partial(_step, -torch.exp(time_decay), time_first)
    return run_rows(step, (key, value), [_empty(key)], cu_seqlens).to(key.dtype)


@wkv.register_fake
def _(key, *_):
    return torch.empty_like(key)


def _step(
    decay: Tensor, first: Tensor, tokens: Sequence[Tensor], states: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One token [N, C] of each sequence from its state [N, 3, C]: numerator, denominator and largest exponent."""
    key, value = tokens[0].float(), tokens[1]
    above, below, largest = states[0].unbind(1)
    most = torch.maximum(largest, key + first)
    before, own = torch.exp(largest - most), torch.exp(key + first - most)
    out = (before * above + own * value) / (before * below + own)
    most = torch.maximum(largest + decay, key)
    before, own = torch.exp(largest + decay - most), torch.exp(key - most)
    return out, [torch.stack([before * above + own * value, before * below + own, most], dim=1)]


def _empty(key: Tensor) -> Tensor:
    return torch.tensor([[0.0], [0.0], [_NEVER]], device=key.device).expand(3, key.shape[-1])


@dataclass(frozen=True)
class WkvFacts:
    """What a backend may ask about one layer."""

    channels: int


def _rwkv_linear_attention(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Any = None,
    return_state: bool = False,
) -> tuple[Tensor, None]:
    """In place of RWKV's own, whose state is None where none is kept."""
    if state is not None or return_state:
        raise UnsupportedFeature("a state that the model keeps itself", where="rwkv_linear_attention")
    return wkv(key, value, time_decay, time_first), None


class Wkv(Kind[WkvFacts]):
    name = "wkv"
    meaning = "RWKV's average whose weights decay with distance"
    op = torch.ops.autodeploy.wkv.default
    layer_types = ("linear_attention",)
    tolerances = TOLERANCES
    token_dims = (1, 1, None, None)
    result_dim = 1
    doors = (Door("rwkv_linear_attention", _rwkv_linear_attention),)

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """key, value, time_decay, time_first."""
        return node.args[:4]

    def describe(self, node: fx.Node) -> Site[WkvFacts]:
        (key,) = recorded(node, node.args[0])
        facts = WkvFacts(int(key.shape[2]))
        return Site(self.name, path_of(node), "linear_attention", key.dtype, key.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[WkvFacts]:
        return Site(self.name, "plain layer", "linear_attention", dtype, device, WkvFacts(64), page_size=16)

    def operands(self, site: Site[WkvFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        channels = site.facts.channels
        tensors = (*torch.randn(2, 1, num_tokens, channels), *torch.randn(2, channels))
        return tuple(tensor.to(site.device, site.dtype) for tensor in tensors)

    def run(self, tensors: tuple[Any, ...], site: Site[WkvFacts]) -> Tensor:
        return wkv(*tensors)


@torch.library.custom_op("autodeploy::reference_cached_wkv", mutates_args=("state_cache",))
def reference_cached_wkv(
    key: Tensor,
    value: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    step_kind: str = MIXED,
) -> Tensor:
    """Tensors as in the canonical op with B = 1, state_cache [slots, 3, C] float32 -> [1, T, C], zeros for padding.

    The int and bool tensors are the fields of the same names.
    """
    kind: StepKind = step_kind  # type: ignore[assignment]
    states = load_states([state_cache], [_empty(key)], state_slots, has_initial_state)
    step = partial(_step, -torch.exp(time_decay), time_first)
    out, (after,) = run_steps(step, (key[0], value[0]), states, cu_seqlens_q, kind)
    state_cache[state_slots] = after
    return out[None].to(key.dtype)


@reference_cached_wkv.register_fake
def _(key, *_, **__):
    return torch.empty_like(key)


class ReferenceWkv(Backend[WkvFacts]):
    name = "reference"
    kind = "wkv"
    meaning = "the oracle: the next token of all sequences, one after another"

    def why_not(self, site: Site[WkvFacts]) -> str | None:
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[WkvFacts]) -> tuple[Cache, ...]:
        return (State("wkv_state", (3, site.facts.channels), torch.float32),)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[WkvFacts]) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.reference_cached_wkv.default(*tensors, *caches, **metadata)


_REFERENCE = ReferenceWkv()
KIND = Wkv()
