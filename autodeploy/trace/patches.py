"""What is different about a model while it is traced, and is put back afterwards, whatever happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from autodeploy.errors import UnsupportedFeature
from autodeploy.ops.causal_conv1d import ACTIVATIONS, causal_conv1d
from autodeploy.trace.interface import IMPLEMENTATION, registered

# Opaque to nothing and dynamic in tokens; "eager" loops over the experts that were hit, "batched_mm" gathers one
# copy of the expert's weights per token.
_EXPERTS = "grouped_mm"


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """While open, running `model` yields canonical ops, in inference mode, one sequence per batch row."""
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(registered(model))
        for config in _configs(model):
            stack.enter_context(_swapped(config, "_attn_implementation_internal", IMPLEMENTATION))
        if model._can_set_experts_implementation():
            for config in _configs(model):
                stack.enter_context(_swapped(config, "_experts_implementation_internal", _EXPERTS))
        # Guesses from jumps in position_ids where one sequence ends; here a batch row is one sequence.
        stack.enter_context(_swapped(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        for module in _modeling_modules(model):
            for name in _DOORS.keys() & vars(module).keys():
                stack.enter_context(_swapped(module, name, _DOORS[name]))
        yield


def _causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:
    if activation not in ACTIVATIONS:
        raise UnsupportedFeature(f"causal_conv1d with activation {activation!r}")
    if seq_idx is not None:
        raise UnsupportedFeature("causal_conv1d over packed sequences (seq_idx)")
    return causal_conv1d(hidden_states, weight, bias, activation=activation)


# Modeling files call their stateful kernels through module-level functions of these names.
_DOORS: dict[str, Callable[..., Any]] = {"causal_conv1d_fn": _causal_conv1d_fn}


@contextmanager
def _swapped(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config that a module of `model` or one of those configs holds, once each."""
    todo = [config for module in model.modules() if isinstance(config := getattr(module, "config", None), PreTrainedConfig)]
    found: dict[int, PreTrainedConfig] = {}
    while todo:
        config = todo.pop()
        if id(config) in found:
            continue
        found[id(config)] = config
        subs = (getattr(config, name, None) for name in config.sub_configs)
        todo += [sub for sub in subs if isinstance(sub, PreTrainedConfig)]
    return list(found.values())


def _modeling_modules(model: nn.Module) -> list[ModuleType]:
    names = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]
