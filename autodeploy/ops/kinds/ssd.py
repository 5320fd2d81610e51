"""`autodeploy::ssd`: state-space duality, the scan of Mamba2 (https://arxiv.org/abs/2405.21060).

Each head keeps a matrix that decays and takes in one outer product per token. What transformers computes in chunks is
computed here with the same chunks, in float32.

Shapes: B batch, S tokens, H heads, P head size, G groups of heads that share B and C, N state size, L tokens of a
chunk, K chunks.
"""

from __future__ import annotations

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

# (atol, rtol) of a backend against the canonical op. All compute in float32 whatever the model's dtype; they cut the
# sums over a sequence, of which the largest terms are around 10, at other places.
TOLERANCES = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), (5e-5, 1e-5))
_NAMES = ("hidden", "dt", "A", "B", "C", "D", "dt_bias")


class Scan(NamedTuple):
    """A scan that is ready to run: hidden [B, S, H, P], dt [B, S, H], A [H], B and C [B, S, G, N], D [H] or None.

    All are float32; dt has its bias and its limits.
    """

    hidden: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None

    def tokens(self, start: int, stop: int) -> Scan:
        cut = [tensor[:, start:stop] for tensor in (self.hidden, self.dt, self.B, self.C)]
        return Scan(cut[0], cut[1], self.A, cut[2], cut[3], self.D)


@torch.library.custom_op("autodeploy::ssd", mutates_args=())
def ssd(
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    """h[t] = exp(dt[t] A) h[t - 1] + dt[t] hidden[t] B[t]ᵀ and out[t] = h[t] C[t] + D hidden[t], for each head.

    hidden [B, S, H, P], dt [B, S, H], A [H] (negative), B and C [B, S, G, N], D and dt_bias [H] or None
    -> [B, S, H, P] float32. States h begin with zeros. dt gets its bias, then softplus if asked for, then its limits.
    `cu_seqlens` [M + 1] int32 cuts one packed row (B = 1) into M sequences that do not see each other.
    """
    scan = prepare(hidden, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max)
    bounds = [0, hidden.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    out = torch.zeros_like(scan.hidden)
    state = scan.hidden.new_zeros(hidden.shape[0], *hidden.shape[2:], B.shape[3])
    for start, stop in pairwise(bounds):
        if start < stop:
            out[:, start:stop] = run_chunks(scan.tokens(start, stop), state, chunk_size)[0]
    return out


@ssd.register_fake
def _(hidden, *_, **__):
    return hidden.new_empty(hidden.shape, dtype=torch.float32)


def prepare(
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
) -> Scan:
    """What comes before the scan, as transformers computes it: dt in its own dtype, the rest in float32."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    D = None if D is None else D.float()
    return Scan(hidden.float(), dt.clamp(dt_min, dt_max).float(), A.float(), B.float(), C.float(), D)


def run_chunks(scan: Scan, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The scan from `state` [B, H, P, N] in chunks from the first token on: its result and the state behind it."""
    num_tokens = scan.hidden.shape[1]
    repeats = scan.hidden.shape[2] // scan.B.shape[2]
    B, C = (tensor.repeat_interleave(repeats, dim=2) for tensor in (scan.B, scan.C))
    hidden, decay, B, C = (
        F.pad(tensor.transpose(1, -1), (0, -num_tokens % chunk_size)).transpose(1, -1).unflatten(1, (-1, chunk_size))
        for tensor in (scan.hidden * scan.dt[..., None], scan.dt * scan.A, B, C)
    )
    decay = decay.permute(0, 3, 1, 2)  # [B, H, K, L]
    total = decay.cumsum(-1)
    scores = torch.einsum("bklhn,bkshn->bklsh", C, B) * segment_sum(decay).exp().permute(0, 2, 3, 4, 1)
    inside = torch.einsum("bklsh,bkshp->bklhp", scores, hidden)
    to_end = (total[..., -1:] - total).exp().permute(0, 2, 3, 1)
    added = torch.einsum("bklhn,bklhp->bkhpn", B * to_end[..., None], hidden)
    between = segment_sum(F.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhkz,bzhpn->bkhpn", between, torch.cat([state[:, None], added], dim=1))
    before = torch.einsum("bklhn,bkhpn->bklhp", C, states[:, :-1]) * total.exp().permute(0, 2, 3, 1)[..., None]
    out = (inside + before).flatten(1, 2)[:, :num_tokens]
    if scan.D is not None:
        out = out + scan.D[:, None] * scan.hidden
    return out, states[:, -1]


def segment_sum(values: Tensor) -> Tensor:
    """[..., L] -> [..., L, L]: at (l, s) the sum of the values behind s up to l, and -inf where s > l.

    Added up rather than taken from differences of one running sum, which would round more.
    """
    size = values.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=values.device)
    sums = values[..., None].expand(*values.shape, size).masked_fill(~ones.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~ones.tril(), -torch.inf)


@dataclass(frozen=True)
class SsdFacts:
    """What a backend may ask about one scan. B and C are shared by num_heads / num_groups heads."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    chunk_size: int
    has_skip: bool = True
    has_dt_bias: bool = True
    dt_softplus: bool = True
    dt_min: float = 0.0
    dt_max: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the canonical op, chunks aside."""
        return {"dt_softplus": self.dt_softplus, "dt_min": self.dt_min, "dt_max": self.dt_max}


def _mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **unread: Any,
) -> Any:
    """What modeling files call, under this name, in place of the package mamba-ssm's `mamba_chunk_scan_combined`."""
    for name, value in {"initial_states": initial_states, **unread}.items():
        if value is not None and name in ("initial_states", "seq_idx", "cu_seqlens", "z"):
            raise UnsupportedFeature(f"a state-space scan with {name}", where="mamba2_chunk_scan")
    least, most = dt_limit
    limits = {"dt_min": least, "dt_max": None if most == float("inf") else most}
    out = ssd(hidden_states, dt, A, B, C, D, dt_bias, chunk_size=chunk_size, dt_softplus=dt_softplus, **limits)
    return (out, None) if return_final_states else out


def _lightning_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **_: Any
) -> tuple[Tensor, None]:
    """In place of MiniMax's layer: linear attention is a scan whose decay is a constant of each head.

    MiniMax keeps the state in the model's dtype.
    """
    if attention_mask is not None or past_key_values is not None:
        raise UnsupportedFeature("lightning attention with a mask or a cache", where=type(module).__name__)
    qkv = module.act_fn(module.qkv_proj(hidden_states)).unflatten(-1, (module.num_attention_heads, -1))
    query, key, value = qkv.split(module.head_dim, dim=3)
    decay, every = -module.slope_rate.flatten(), torch.ones_like(query[..., 0])
    out = ssd(value, every, decay, key, query, chunk_size=module.block_size).to(value.dtype)
    gate = torch.sigmoid(module.output_gate(hidden_states))
    return module.out_proj(gate * module.norm(out.flatten(2))), None


class Ssd(Kind[SsdFacts]):
    name = "ssd"
    meaning = "state-space scan of Mamba2, in chunks, with a matrix for each head as state"
    op = torch.ops.autodeploy.ssd.default
    layer_types = ("linear_attention",)
    tolerances = TOLERANCES
    token_dims = (1, 1, None, 1, 1, None, None)
    result_dim = 1
    doors = (
        Door("mamba2_chunk_scan", _mamba2_chunk_scan),
        Door("forward", _lightning_attention, owner="MiniMaxLightningAttention"),
    )

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """hidden, dt, A, B, C, D, dt_bias."""
        padded = (*node.args, None, None)[: len(_NAMES)]
        return tuple(node.kwargs.get(name, arg) for name, arg in zip(_NAMES, padded, strict=True))

    def describe(self, node: fx.Node) -> Site[SsdFacts]:
        hidden, dt, A, B, C, D, dt_bias = self.tensors(node)
        x, b, *_ = recorded(node, hidden, B, C, dt, A)
        options: dict[str, Any] = {name: arg for name, arg in node.kwargs.items() if name in SsdFacts.__annotations__}
        facts = SsdFacts(
            num_heads=int(x.shape[2]),
            head_dim=int(x.shape[3]),
            num_groups=int(b.shape[2]),
            state_size=int(b.shape[3]),
            has_skip=D is not None,
            has_dt_bias=dt_bias is not None,
            **{"dt_softplus": False} | options,
        )
        return Site(self.name, path_of(node), self.layer_types[0], x.dtype, x.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[SsdFacts]:
        facts = SsdFacts(num_heads=4, head_dim=64, num_groups=1, state_size=64, chunk_size=64)
        return Site(self.name, "plain layer", self.layer_types[0], dtype, device, facts, page_size=16)

    def operands(self, site: Site[SsdFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        state = (1, num_tokens, f.num_groups, f.state_size)
        hidden, dt = torch.randn(1, num_tokens, f.num_heads, f.head_dim), torch.randn(1, num_tokens, f.num_heads)
        B, C, D = torch.randn(state), torch.randn(state), torch.randn(f.num_heads) if f.has_skip else None
        tensors = (hidden, dt, None, B, C, D, torch.randn(f.num_heads) if f.has_dt_bias else None)
        made = [None if tensor is None else tensor.to(site.device, site.dtype) for tensor in tensors]
        made[2] = -torch.rand(f.num_heads, device=site.device) - 0.05  # models keep A in float32
        return tuple(made)

    def run(self, tensors: tuple[Any, ...], site: Site[SsdFacts]) -> Tensor:
        return ssd(*tensors, chunk_size=site.facts.chunk_size, **site.facts.options)


class CachedSsd(Backend[SsdFacts]):
    """What all backends of the scan have in common: they cache each sequence's state [H, P, N], in float32."""

    kind = "ssd"

    def why_not(self, site: Site[SsdFacts]) -> str | None:
        if site.dtype is torch.float64:
            return "float64 is not supported: the scan is computed in float32"
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[SsdFacts]) -> tuple[Cache, ...]:
        f = site.facts
        return (State("ssm_state", (f.num_heads, f.head_dim, f.state_size), torch.float32),)


@torch.library.custom_op("autodeploy::reference_cached_ssd", mutates_args=("state_cache",))
def reference_cached_ssd(
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    chunk_size: int,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    """Scan one sequence after another, from its cached state or from zeros, and cache the state behind its last token.

    hidden [1, T, H, P] and so on as in the canonical op, state_cache [slots, H, P, N] float32 -> [1, T, H, P] float32,
    zeros for padding tokens. The int and bool tensors are the fields of the same names.
    """
    scan = prepare(hidden, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max)
    out = torch.zeros_like(scan.hidden)
    rows = zip(state_slots.tolist(), has_initial_state.tolist(), pairwise(cu_seqlens_q.tolist()), strict=True)
    for slot, goes_on, (start, stop) in rows:
        if start == stop:
            continue
        state = state_cache[slot] if goes_on else torch.zeros_like(state_cache[slot])
        out[:, start:stop], (state_cache[slot],) = run_chunks(scan.tokens(start, stop), state[None], chunk_size)
    return out


@reference_cached_ssd.register_fake
def _(hidden, *_, **__):
    return hidden.new_empty(hidden.shape, dtype=torch.float32)


class ReferenceSsd(CachedSsd):
    name = "reference"
    meaning = "the oracle: scans one sequence after another"

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[SsdFacts]) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site[SsdFacts]
    ) -> Tensor:
        return torch.ops.autodeploy.reference_cached_ssd.default(
            *tensors, *caches, **metadata, chunk_size=site.facts.chunk_size, **site.facts.options
        )


_REFERENCE = ReferenceSsd()
KIND = Ssd()
