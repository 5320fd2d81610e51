"""`autodeploy::causal_conv1d`: depthwise convolution over time that sees only the past (LFM2, Mamba, delta rule).

Shapes: B batch, C channels, S tokens, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.nn import functional as F

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.location import node_location
from autodeploy.graph.meta import VALUE
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, State
from autodeploy.ops.kind import Door, Kind, Written
from autodeploy.ops.site import Site, path_of, recorded

ACTIVATIONS = (None, "silu", "swish")

# (atol, rtol) of a backend against the canonical op: another order of summation; float16 keeps 11 bits of the result
# and bfloat16 8.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


@torch.library.custom_op("autodeploy::causal_conv1d", mutates_args=())
def causal_conv1d(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """out[b, c, t] = act(bias[c] + Σ_k weight[c, k] · hidden[b, c, t - (K - 1) + k]), zeros before the start.

    hidden [B, C, S], weight [C, K], bias [C] or None -> [B, C, S], in hidden's dtype. `activation` is None, "silu" or
    "swish". `cu_seqlens` [N + 1] int32 cuts one packed row (B = 1) into N sequences that do not see each other.
    """
    num_taps = weight.shape[1]
    if cu_seqlens is None:
        windows_BCSK = F.pad(hidden, (num_taps - 1, 0)).unfold(-1, num_taps, 1)
    else:
        windows_BCSK = _ragged_windows(hidden, num_taps, cu_seqlens)
    return convolve(windows_BCSK, weight, bias, activation).to(hidden.dtype).contiguous()


@causal_conv1d.register_fake
def _(hidden, weight, bias=None, cu_seqlens=None, *, activation=None):
    return hidden.new_empty(hidden.shape)


def convolve(windows: Tensor, weight_CK: Tensor, bias_C: Tensor | None, activation: str | None) -> Tensor:
    """The arithmetic shared with the cached backends: windows [B, C, S, K] -> [B, C, S]."""
    batch, channels, tokens, num_taps = windows.shape
    # One conv1d over the stacked windows, so that each output is the same K-term dot product as in the model.
    stacked = windows.permute(0, 2, 1, 3).reshape(batch * tokens, channels, num_taps)
    out = F.conv1d(stacked.to(weight_CK.dtype), weight_CK.unsqueeze(1), bias_C, groups=channels)
    out = out.reshape(batch, tokens, channels).transpose(1, 2)
    return F.silu(out) if activation in ("silu", "swish") else out


def _ragged_windows(hidden_BCS: Tensor, num_taps: int, cu_seqlens: Tensor) -> Tensor:
    index_S = torch.arange(hidden_BCS.shape[-1], device=hidden_BCS.device)
    row_S = torch.searchsorted(cu_seqlens, index_S.to(cu_seqlens.dtype), right=True) - 1
    start_S = cu_seqlens[row_S]
    source_SK = index_S[:, None] - torch.arange(num_taps - 1, -1, -1, device=hidden_BCS.device)
    inside_SK = source_SK >= start_S[:, None]
    windows = hidden_BCS[:, :, source_SK.clamp(min=0)]
    return torch.where(inside_SK, windows, torch.zeros((), dtype=windows.dtype, device=windows.device))


@dataclass(frozen=True)
class ConvFacts:
    """What a backend may ask about one convolution; `kernel_size` is N, the number of taps."""

    channels: int
    kernel_size: int
    has_bias: bool = False
    activation: str | None = None


def _causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What modeling files call, under this name, as they do the function of the package causal-conv1d."""
    if seq_idx is not None:
        raise UnsupportedFeature("packed sequences (seq_idx)", where="causal_conv1d_fn")
    return causal_conv1d(hidden_states, weight, bias, activation=activation)


def _ngram_embedding(module: Any, input_ids: Tensor, past_key_values: Any = None) -> Tensor:
    """In place of Qwen4's, which joins the ids before the first new ones: here these come by token shifts.

    An id is hashed with those before it, back to the last end of sequence.
    """
    if past_key_values is not None:
        raise UnsupportedFeature("ids before the first ones in a cache", where=type(module).__name__)
    end = module.eos_token_id
    before, shifted = input_ids.long(), [input_ids.long()]
    is_over = torch.zeros_like(before, dtype=torch.bool)
    for _ in range(module.context_len):
        before = _id_before(before, end)
        is_over = is_over | (before == end)
        shifted.append(torch.where(is_over, end, before))
    blocks, mixed = [], shifted[0] * module.layer_multipliers[0]
    for place, ids in enumerate(shifted[1:], start=1):
        heads = slice((place - 1) * module.heads_per_ngram, place * module.heads_per_ngram)
        mixed = torch.bitwise_xor(mixed, ids * module.layer_multipliers[place])
        hashed = torch.remainder(mixed[..., None], module.ngram_heads_vocab_sizes[heads])
        blocks.append(hashed + module.ngram_heads_offsets[heads])
    return module.ngram_embedding(torch.cat(blocks, dim=-1)).flatten(-2)


def _id_before(ids: Tensor, none: int) -> Tensor:
    """The id before each one, `none` before the first; ids [B, S] are exact in float64."""
    taps = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=ids.device)
    before = causal_conv1d((ids + 1).to(torch.float64)[:, None], taps)[:, 0].to(torch.int64) - 1
    return torch.where(before < 0, none, before)


# Of ATen's conv1d: bias, stride, padding, dilation and groups.
_CONV1D_DEFAULTS = (None, [1], [0], [1], 1)


def _is_zeros(node: fx.Node, wanted: list[int]) -> bool:
    """Whether `node` pads by zeros, as much as is wanted."""
    if node.target not in (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default):
        return False
    widths, *options = cast(Any, node.args[1:])
    is_zero = all(option in ("constant", 0, None) for option in options) and not node.kwargs
    return is_zero and list(widths) == wanted


def _convolution(node: fx.Node) -> Written | None:
    arguments: Any = (*node.args, *_CONV1D_DEFAULTS[len(node.args) - 2 :])
    hidden, weight, bias, stride, padding, dilation, groups = arguments
    channels, shared, taps = VALUE.of(weight).shape
    (gap,) = dilation
    reach = (taps - 1) * gap
    if (shared, groups, list(stride)) != (1, channels, [1]):
        return None
    output = node
    if list(padding) == [reach]:
        output, *others = node.users
        if others or output.target is not torch.ops.aten.slice.Tensor or output.args[2] not in (None, 0):
            return None
    elif _is_zeros(_uncut(hidden), [reach, 0]):
        hidden = _uncut(hidden).all_input_nodes[0]
    is_cut = _is_as_large(output, hidden)
    return Written(output, partial(_convolve, gap, reach + 1), (hidden, weight, bias)) if is_cut else None


def _convolve(gap: int, num_taps: int, hidden: Tensor, weight_C1N: Tensor, bias: Tensor | None) -> Tensor:
    """With zeros for taps in the gaps of a dilated convolution."""
    aten = torch.ops.aten
    if gap > 1:
        spread_C1ND = aten.constant_pad_nd.default(aten.unsqueeze.default(weight_C1N, 3), [0, gap - 1])
        weight_C1N = aten.slice.Tensor(aten.flatten.using_ints(spread_C1ND, 2), 2, 0, num_taps)
    return torch.ops.autodeploy.causal_conv1d.default(hidden, aten.squeeze.dim(weight_C1N, 1), bias)


def _uncut(node: fx.Node) -> fx.Node:
    """What `node` is all of, in a slice that drops nothing."""
    while node.target is torch.ops.aten.slice.Tensor and _is_as_large(node, node.all_input_nodes[0]):
        node = node.all_input_nodes[0]
    return node


def _is_as_large(node: fx.Node, other: fx.Node) -> bool:
    return statically_known_true(sym_eq(VALUE.of(node).shape, VALUE.of(other).shape))


def _shift(node: fx.Node) -> Written:
    """Of [B, S, C]: what is before each token."""
    value = VALUE.of(node)
    taps_CN = torch.tensor([[1, 0]], dtype=value.dtype, device=value.device).repeat(value.shape[2], 1)
    return Written(node, _before, (node.all_input_nodes[0], taps_CN))


def _before(hidden: Tensor, taps: Tensor) -> Tensor:
    out = torch.ops.autodeploy.causal_conv1d.default(torch.ops.aten.transpose.int(hidden, 1, 2), taps)
    return torch.ops.aten.transpose.int(out, 1, 2)


class CausalConv1d(Kind[ConvFacts]):
    name = "causal_conv1d"
    meaning = "depthwise causal convolution with a rolling state"
    op = torch.ops.autodeploy.causal_conv1d.default
    layer_types = ("conv",)
    tolerances = TOLERANCES
    token_dims = (2, None, None)
    result_dim = 2
    doors = (
        Door("causal_conv1d_fn", _causal_conv1d_fn),
        Door("forward", _ngram_embedding, owner="Qwen4ExpTextNGramEmbedding"),
    )
    near = (torch.ops.aten.conv1d.default, torch.ops.aten.pad.default)

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def recognize(self, node: fx.Node) -> Written | str | None:
        """A depthwise convolution of zeros and a sequence, or of zeros on both sides that is cut to the sequence; or
        the tokens before each one, of which the last is dropped: a convolution whose only tap is the one before.
        """
        if not all(VALUE.on(arg) for arg in node.all_input_nodes):
            return super().recognize(node)
        if node.target is torch.ops.aten.pad.default:
            return _shift(node) if _is_zeros(node, [0, 0, 1, -1]) and VALUE.of(node).dim() == 3 else None
        return _convolution(node) or super().recognize(node)

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """hidden, weight, bias."""
        padded = (*node.args, None)[:3]
        return tuple(node.kwargs.get(name, arg) for name, arg in zip(("hidden", "weight", "bias"), padded, strict=True))

    def describe(self, node: fx.Node) -> Site[ConvFacts]:
        hidden, weight, bias = self.tensors(node)
        x, w = recorded(node, hidden, weight)
        activation: Any = node.kwargs.get("activation")
        if activation not in ACTIVATIONS:
            raise UnsupportedFeature(f"causal_conv1d with activation {activation!r}", where=node_location(node))
        facts = ConvFacts(int(w.shape[0]), int(w.shape[1]), bias is not None, activation)
        return Site(self.name, path_of(node), "conv", x.dtype, x.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[ConvFacts]:
        facts = ConvFacts(channels=64, kernel_size=4, activation="silu")
        return Site(self.name, "plain layer", "conv", dtype, device, facts, page_size=16)

    def operands(self, site: Site[ConvFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        bias = torch.randn(f.channels) if f.has_bias else None
        tensors = (torch.randn(1, f.channels, num_tokens), torch.randn(f.channels, f.kernel_size), bias)
        return tuple(None if tensor is None else tensor.to(site.device, site.dtype) for tensor in tensors)

    def run(self, tensors: tuple[Any, ...], site: Site[ConvFacts]) -> Tensor:
        return causal_conv1d(*tensors, activation=site.facts.activation)


class CachedConv1d(Backend[ConvFacts]):
    """What all backends of the convolution have in common: they cache the last N - 1 inputs of each sequence."""

    kind = "causal_conv1d"

    def why_not(self, site: Site[ConvFacts]) -> str | None:
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[ConvFacts]) -> tuple[Cache, ...]:
        return (State("conv_state", (site.facts.channels, site.facts.kernel_size - 1), site.dtype),)


@torch.library.custom_op("autodeploy::reference_cached_causal_conv1d", mutates_args=("state_cache",))
def reference_cached_causal_conv1d(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    activation: str | None = None,
) -> Tensor:
    """Convolve each sequence's cached inputs followed by its new ones, and cache the last N - 1 of them.

    hidden [1, C, T], weight [C, N], bias [C] or None, state_cache [slots, C, N - 1] -> [1, C, T], zeros for padding
    tokens. The int and bool tensors are the fields of the same names.
    """
    num_taps = weight.shape[1]
    out_CT = torch.zeros_like(hidden[0])
    starts = cu_seqlens_q.tolist()
    for row, (slot, goes_on) in enumerate(zip(state_slots.tolist(), has_initial_state.tolist(), strict=True)):
        start, stop = starts[row], starts[row + 1]
        if start == stop:
            continue
        old = state_cache[slot] if goes_on else torch.zeros_like(state_cache[slot])
        inputs_CL = torch.cat([old, hidden[0, :, start:stop]], dim=1)
        out_CT[:, start:stop] = convolve(inputs_CL.unfold(1, num_taps, 1)[None], weight, bias, activation)[0]
        state_cache[slot] = inputs_CL[:, stop - start :]
    return out_CT[None]


@reference_cached_causal_conv1d.register_fake
def _(hidden, *_, **__):
    return hidden.new_empty(hidden.shape)


class ReferenceCausalConv1d(CachedConv1d):
    name = "reference"
    meaning = "the oracle: convolves one sequence after another"

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[ConvFacts]) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.reference_cached_causal_conv1d.default(
            *tensors, *caches, **metadata, activation=site.facts.activation
        )


_REFERENCE = ReferenceCausalConv1d()
KIND = CausalConv1d()
