"""Experts that models run one after another, over tokens that are counted on the host: here in one grouped product.

The doors are class and method, as those of a kind; a method returns what the original returns but for the order of its
sums. Counts stay tensors: `jetmoe` hands the sizes of its groups on as a list, and here as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations import moe


class Routed(NamedTuple):
    """The method `name` of the class `owner` in a modeling file, and what it is while a model is traced."""

    owner: str
    name: str
    function: Callable[..., Any]


def dbrx_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [B, S, H], of each token k experts [B * S, k] int64 and their weights -> [B, S, H]."""
    glu, num_chosen = module.mlp, top_k_index.shape[-1]
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    gate_EFH, up_EFH, down_EFH = (weight.view(shape) for weight in (glu.w1, glu.v1, glu.w2))
    expert_N, order_N = torch.sort(top_k_index.reshape(-1))
    ends_E = F.one_hot(expert_N, module.num_experts).sum(0).cumsum(0, dtype=torch.int32)
    token_NH = hidden_states.reshape(-1, module.hidden_size)[order_N // num_chosen]
    inner_NF = glu.activation_fn(_grouped(token_NH, gate_EFH.mT, ends_E)) * _grouped(token_NH, up_EFH.mT, ends_E)
    result_NH = _grouped(inner_NF, down_EFH, ends_E) * top_k_weights.reshape(-1)[order_N, None]
    back_N = torch.empty_like(order_N)
    back_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    return result_NH[back_N].view(-1, num_chosen, module.hidden_size).sum(1).view(hidden_states.shape)


def jetmoe_gating(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the original for hidden_states [T, H], with the number of tokens per expert [E] int64 as a tensor."""
    logits = module.layer(hidden_states).float()
    top_k_logits, top_k_indices = logits.topk(module.top_k, dim=1)
    gates = torch.softmax(top_k_logits, dim=1).type_as(hidden_states)
    expert_N, order_N = torch.sort(top_k_indices.flatten())
    sizes_E = F.one_hot(expert_N, module.num_experts).sum(0)
    return order_N, order_N // module.top_k, gates.flatten()[order_N], sizes_E, logits


def jetmoe_experts(module: Any, inputs: Tensor, expert_size: Tensor) -> Tensor:
    """inputs [N, I], sorted by expert, and how many each has -> [N, O]."""
    return _grouped(inputs, module.weight.mT, expert_size.cumsum(0, dtype=torch.int32))


def _grouped(input_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return moe._grouped_mm(input_NI, weight_EIO, ends_E)


ROUTED = (
    Routed("DbrxExperts", "forward", dbrx_experts),
    Routed("JetMoeTopKGating", "forward", jetmoe_gating),
    Routed("JetMoeParallelExperts", "forward", jetmoe_experts),
)
