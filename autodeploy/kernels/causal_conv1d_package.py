"""Causal convolution by the package causal-conv1d, where it is installed.

A decode step updates the states in place. For longer rows the package has nothing that begins with several cached
states, so that tokens and states are gathered into one stream (`metadata/conv1d_fields.py`).

Shapes: S sequences, T packed tokens, C channels, N taps.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels import conv1d_fields, torch_fields
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.causal_conv1d import CachedConv1d
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_TAPS = 4

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "package_causal_conv1d(Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) state_cache, Tensor state_slots,"
    " Tensor updated_slots, Tensor fresh_slots, Tensor stream_indices, Tensor stream_places, Tensor state_indices, *,"
    " str? activation=None, str step_kind='mixed') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "package_causal_conv1d", "CompositeExplicitAutograd")
def _causal_conv1d(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_cache: Tensor,
    state_slots: Tensor,
    updated_slots: Tensor,
    fresh_slots: Tensor,
    stream_indices: Tensor,
    stream_places: Tensor,
    state_indices: Tensor,
    *,
    activation: str | None = None,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """Convolve each sequence's cached inputs followed by its new ones, and cache the last N - 1 of them.

    hidden [1, C, T], weight [C, N], bias [C] or None, state_cache [slots, C, N - 1] -> [1, C, T] with neighbouring
    channels side by side. The int tensors are fields.
    """
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # pyright: ignore[reportMissingImports]

    hidden_CT = hidden[0]
    if step_kind == DECODE:
        state_cache.index_fill_(0, fresh_slots, 0)
        slots = {"conv_state_indices": updated_slots}
        out_TC = causal_conv1d_update(hidden_CT.T, state_cache, weight, bias, activation, **slots)
        return out_TC.contiguous()[None].transpose(1, 2)
    old_CM = state_cache[state_slots].transpose(0, 1).flatten(1)
    source_CM = torch.cat([hidden_CT, old_CM, torch.zeros_like(hidden_CT[:, :1])], dim=1)
    stream_1CM = source_CM.index_select(1, stream_indices)[None]
    out_1CM = causal_conv1d_fn(stream_1CM, weight, bias, activation=activation)
    state_cache.index_put_((state_slots,), source_CM[:, state_indices].transpose(0, 1))
    return out_1CM.transpose(1, 2).index_select(1, stream_places).transpose(1, 2)


@torch.library.register_fake("autodeploy::package_causal_conv1d", lib=_library)
def _(hidden, *_, **__):
    return hidden.new_empty(1, hidden.shape[2], hidden.shape[1]).transpose(1, 2)


class PackageCausalConv1d(CachedConv1d):
    name = "causal_conv1d"
    meaning = "the package causal-conv1d"

    def why_not(self, site: Site) -> str | None:
        if site.device.type != "cuda":
            return f"causal-conv1d needs a GPU, not {site.device.type}"
        if not _is_installed():
            return "causal-conv1d is not installed: pip install causal-conv1d"
        if site.dtype not in _DTYPES:
            return f"{site.dtype} is not among float16, bfloat16 and float32".replace("torch.", "")
        taps = site.facts.kernel_size
        return None if 2 <= taps <= _MAX_TAPS else f"{taps} taps are not among 2 to {_MAX_TAPS}"

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        taps = site.facts.kernel_size
        return {
            "state_slots": fields.state_slots(layout),
            "updated_slots": conv1d_fields.updated_slots(layout),
            "fresh_slots": conv1d_fields.fresh_slots(layout),
            "stream_indices": conv1d_fields.conv_stream_indices(layout, num_tokens, taps),
            "stream_places": conv1d_fields.conv_stream_places(layout, num_tokens, taps),
            "state_indices": torch_fields.conv_state_indices(layout, num_tokens, taps),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.package_causal_conv1d.default(
            *tensors, *caches, **metadata, activation=site.facts.activation
        )


def _is_installed() -> bool:
    try:
        version("causal-conv1d")
    except PackageNotFoundError:
        return False
    return True


BACKENDS: tuple[Backend, ...] = (PackageCausalConv1d(),)
