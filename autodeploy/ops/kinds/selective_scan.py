"""`autodeploy::selective_scan`: the scan of Mamba (https://arxiv.org/abs/2312.00752).

Each channel keeps a vector whose entries decay and take in the token, at rates that the token itself sets.

Shapes: B batch, S tokens, C channels, N state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
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

# (atol, rtol) of a backend against the canonical op, by the dtype of the states: all add in the same order, and round
# products otherwise. Of a 16-bit model the states are rounded before they are read, where the last bit may differ.
TOLERANCES = {
    torch.float32: (2e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
_NAMES = ("hidden", "dt", "A", "B", "C", "D", "gate", "dt_bias")


@torch.library.custom_op("autodeploy::selective_scan", mutates_args=())
def selective_scan(
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    gate: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    dt_softplus: bool = False,
) -> Tensor:
    """h[t] = exp(dt[t] A) h[t - 1] + dt[t] B[t] hidden[t] and out[t] = (C[t] · h[t] + D hidden[t]) silu(gate[t]).

    For each channel: hidden, dt and gate [B, C, S], A [C, N] float32 (negative), B and C [B, N, S], D and dt_bias [C];
    D, gate and dt_bias may be None -> [B, C, S] in the wider dtype of hidden and D. States h [N] are float32 and begin
    with zeros. dt gets its bias, then softplus if asked for. `cu_seqlens` [M + 1] int32 cuts one packed row (B = 1)
    into M sequences that do not see each other.
    """
    dt = step_sizes(dt, dt_bias, dt_softplus)
    state = hidden.new_zeros(hidden.shape[0], *A.shape, dtype=torch.float32)
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    for start, stop in pairwise([0, hidden.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()):
        own = (tensor[:, :, start:stop] for tensor in (hidden, dt, B, C))
        out[:, :, start:stop] = scan(*own, A=A, state=state)[0]
    return finish(out, hidden, D, gate).contiguous()


@selective_scan.register_fake
def _(hidden, dt, A, B, C, D=None, *_, **__):
    return hidden.new_empty(hidden.shape, dtype=result_dtype(hidden, D))


def result_dtype(hidden: Tensor, D: Tensor | None) -> torch.dtype:
    return hidden.dtype if D is None else torch.promote_types(hidden.dtype, D.dtype)


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    """dt with its bias, in its own dtype as in transformers."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)[:, None]
    return F.softplus(dt) if dt_softplus else dt


def scan(hidden: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """From `state` [B, C, N] float32: C[t] · h[t] in hidden's dtype, and the state behind the last token.

    Sums and products as transformers' `mamba_selective_scan` has them.
    """
    decay = torch.exp(A[:, None] * dt[..., None])
    added = dt[..., None] * B.mT[:, None].float() * hidden[..., None].float()
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    for index in range(hidden.shape[2]):
        state = decay[:, :, index] * state + added[:, :, index]
        out[:, :, index] = torch.matmul(state.to(hidden.dtype), C[:, :, index, None])[:, :, 0]
    return out, state


def finish(out: Tensor, hidden: Tensor, D: Tensor | None, gate: Tensor | None) -> Tensor:
    """What comes behind the scan."""
    if D is not None:
        out = out + hidden * D[:, None]
    return out if gate is None else out * F.silu(gate)


@dataclass(frozen=True)
class SelectiveScanFacts:
    """What a backend may ask about one scan."""

    channels: int
    state_size: int
    has_skip: bool = True
    has_gate: bool = True
    has_dt_bias: bool = True
    dt_softplus: bool = True


def _mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **unread: Any,
) -> Any:
    """What modeling files call, under this name, in place of the package mamba-ssm's `selective_scan_fn`."""
    for name in ("seq_idx", "cu_seqlens", "initial_states"):
        if unread.get(name) is not None:
            raise UnsupportedFeature(f"a selective scan with {name}", where="mamba_selective_scan")
    out = selective_scan(hidden_states, dt, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus)
    return (out, None) if return_last_state else out


class SelectiveScan(Kind[SelectiveScanFacts]):
    name = "selective_scan"
    meaning = "scan of Mamba, with a vector for each channel as state"
    op = torch.ops.autodeploy.selective_scan.default
    layer_types = ("linear_attention",)
    tolerances = TOLERANCES
    token_dims = (2, 2, None, 2, 2, None, 2, None)
    result_dim = 2
    doors = (Door("mamba_selective_scan", _mamba_selective_scan),)

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """hidden, dt, A, B, C, D, gate, dt_bias."""
        padded = (*node.args, None, None, None)[: len(_NAMES)]
        return tuple(node.kwargs.get(name, arg) for name, arg in zip(_NAMES, padded, strict=True))

    def describe(self, node: fx.Node) -> Site[SelectiveScanFacts]:
        hidden, dt, A, B, C, D, gate, dt_bias = self.tensors(node)
        x, a, *_ = recorded(node, hidden, A, dt, B, C)
        facts = SelectiveScanFacts(
            channels=int(a.shape[0]),
            state_size=int(a.shape[1]),
            has_skip=D is not None,
            has_gate=gate is not None,
            has_dt_bias=dt_bias is not None,
            dt_softplus=bool(node.kwargs.get("dt_softplus", False)),
        )
        return Site(self.name, path_of(node), self.layer_types[0], x.dtype, x.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[SelectiveScanFacts]:
        facts = SelectiveScanFacts(channels=128, state_size=16)
        return Site(self.name, "plain layer", self.layer_types[0], dtype, device, facts, page_size=16)

    def operands(self, site: Site[SelectiveScanFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        hidden, dt, gate = torch.randn(3, 1, f.channels, num_tokens).to(site.device, site.dtype)
        B, C = torch.randn(2, 1, f.state_size, num_tokens).to(site.device, site.dtype)
        # Models keep these in float32.
        A = -torch.rand(f.channels, f.state_size, device=site.device) - 0.05
        D, dt_bias = torch.randn(2, f.channels, device=site.device)
        skip, bias = D if f.has_skip else None, dt_bias if f.has_dt_bias else None
        return hidden, dt if f.dt_softplus else dt.abs(), A, B, C, skip, gate if f.has_gate else None, bias

    def run(self, tensors: tuple[Any, ...], site: Site[SelectiveScanFacts]) -> Tensor:
        return selective_scan(*tensors, dt_softplus=site.facts.dt_softplus)


class CachedSelectiveScan(Backend[SelectiveScanFacts]):
    """What all backends of the scan have in common: they cache each sequence's states [C, N], in float32."""

    kind = "selective_scan"

    def why_not(self, site: Site[SelectiveScanFacts]) -> str | None:
        if site.dtype is torch.float64:
            return "float64 is not supported: the scan is computed in float32"
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[SelectiveScanFacts]) -> tuple[Cache, ...]:
        return (State("ssm_state", (site.facts.channels, site.facts.state_size), torch.float32),)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[SelectiveScanFacts]) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }


@torch.library.custom_op("autodeploy::reference_cached_selective_scan", mutates_args=("state_cache",))
def reference_cached_selective_scan(
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    dt_softplus: bool = False,
) -> Tensor:
    """Scan one sequence after another, from its cached state or from zeros, and cache the state behind its last token.

    hidden [1, C, T] and so on as in the canonical op, state_cache [slots, C, N] float32 -> [1, C, T], noise for padding
    tokens. The int and bool tensors are the fields of the same names.
    """
    dt = step_sizes(dt, dt_bias, dt_softplus)
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    rows = zip(state_slots.tolist(), has_initial_state.tolist(), pairwise(cu_seqlens_q.tolist()), strict=True)
    for slot, goes_on, (start, stop) in rows:
        if start == stop:
            continue
        state = state_cache[slot] if goes_on else torch.zeros_like(state_cache[slot])
        own = (tensor[:, :, start:stop] for tensor in (hidden, dt, B, C))
        out[:, :, start:stop], (state_cache[slot],) = scan(*own, A=A, state=state[None])
    return finish(out, hidden, D, gate).contiguous()


@reference_cached_selective_scan.register_fake
def _(hidden, dt, A, B, C, D, *_, **__):
    return hidden.new_empty(hidden.shape, dtype=result_dtype(hidden, D))


class ReferenceSelectiveScan(CachedSelectiveScan):
    name = "reference"
    meaning = "the oracle: scans one sequence after another"

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.reference_cached_selective_scan.default(
            *tensors, *caches, *metadata.values(), dt_softplus=site.facts.dt_softplus
        )


_REFERENCE = ReferenceSelectiveScan()
KIND = SelectiveScan()
