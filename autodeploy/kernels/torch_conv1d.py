"""Causal convolution from a cached state in plain torch, which Inductor fuses with its neighbours.

New tokens, cached states and one zero are laid end to end; two index fields say what each tap reads.
Shapes: S sequences, T packed tokens, C channels, N taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autodeploy.kernels import torch_fields
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.causal_conv1d import CachedConv1d
from autodeploy.ops.site import Site


class TorchCausalConv1d(CachedConv1d):
    name = "torch_conv1d"
    meaning = "gathers each token's taps and lets Inductor fuse the rest"

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        taps = site.facts.kernel_size
        return {
            "state_slots": fields.state_slots(layout),
            "window_indices": torch_fields.conv_window_indices(layout, num_tokens, taps),
            "state_indices": torch_fields.conv_state_indices(layout, num_tokens, taps),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        hidden_1CT, weight_CN, bias_C = tensors
        (states,) = caches
        slot_S = metadata["state_slots"]
        old_CM = states[slot_S].transpose(0, 1).flatten(1)
        # A stale or padding state may hold NaN: it is laid out like the others, but no index points to it.
        source_CM = torch.cat([hidden_1CT[0], old_CM, torch.zeros_like(hidden_1CT[0, :, :1])], dim=1)
        windows_CTN = source_CM[:, metadata["window_indices"]].to(torch.promote_types(site.dtype, torch.float32))
        out_CT = (windows_CTN * weight_CN[:, None]).sum(-1)
        if bias_C is not None:
            out_CT = out_CT + bias_C[:, None]
        if site.facts.activation is not None:
            out_CT = F.silu(out_CT)
        torch.ops.aten.index_put_.default(states, [slot_S], source_CM[:, metadata["state_indices"]].transpose(0, 1))
        return out_CT.to(site.dtype)[None]


BACKENDS: tuple[Backend, ...] = (TorchCausalConv1d(),)
