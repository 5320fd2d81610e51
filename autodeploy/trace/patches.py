"""What is different about a model while it is traced, and is put back afterwards, whatever happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from autodeploy.errors import UnsupportedFeature
from autodeploy.ops.kinds.causal_conv1d import causal_conv1d
from autodeploy.trace.interface import IMPLEMENTATION, registered

_SETTINGS: dict[str, object] = {
    "_attn_implementation_internal": IMPLEMENTATION,
    # "eager" loops over the experts that were hit, which is data; "batched_mm" gathers a copy of the weights per token.
    "_experts_implementation_internal": "grouped_mm",
    "use_cache": False,
}


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """While open, running `model` yields canonical ops, in inference mode, one sequence per batch row."""
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(registered(model))
        for config, name in product(_configs(model), _SETTINGS):
            if hasattr(config, name):
                stack.enter_context(_swapped(config, name, _SETTINGS[name]))
        # Guesses from jumps in position_ids where one sequence ends; here a batch row is one sequence.
        stack.enter_context(_swapped(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        stack.enter_context(_swapped(masking_utils, "chunked_overlay", _chunked_overlay))
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
    if seq_idx is not None:
        raise UnsupportedFeature("packed sequences (seq_idx)", where="causal_conv1d_fn")
    return causal_conv1d(hidden_states, weight, bias, activation=activation)


def _chunked_overlay(chunk_size: int, left_padding: Tensor) -> Callable[..., Any]:
    """Without the padding, which rows of a traced batch have none of, and whose tensor cannot be asked."""
    return lambda batch, head, query, key: key // chunk_size == query // chunk_size


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
    todo = [getattr(module, "config", None) for module in model.modules()]
    found: dict[int, PreTrainedConfig] = {}
    while todo:
        config = todo.pop()
        if not isinstance(config, PreTrainedConfig) or id(config) in found:
            continue
        found[id(config)] = config
        todo += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _modeling_modules(model: nn.Module) -> list[ModuleType]:
    names = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]
