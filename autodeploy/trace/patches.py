"""What is different about a model while it is traced, and is put back afterwards, whatever happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from autodeploy.ops.kinds import kinds
from autodeploy.trace.interface import IMPLEMENTATION, registered
from autodeploy.trace.routing import ROUTED

_SETTINGS: dict[str, object] = {
    "_attn_implementation_internal": IMPLEMENTATION,
    # "eager" loops over the experts that were hit, which is data; "batched_mm" gathers a copy of the weights per token.
    "_experts_implementation_internal": "grouped_mm",
    "use_cache": False,
    # xLSTM cuts longer inputs for its own states, which are not those of a graph.
    "max_inference_chunksize": sys.maxsize,
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
        doors = [door for kind in kinds() for door in kind.doors]
        for module, door in product(_modeling_modules(model), doors):
            owner = module if door.owner is None else vars(module).get(door.owner)
            if owner is not None and door.name in vars(owner):
                stack.enter_context(_swapped(owner, door.name, door.function))
        for module, (name, function) in product(_modeling_modules(model), _SYMBOLIC.items()):
            if name not in vars(module):
                stack.enter_context(_shadowed(module, name, function))
        for module, routed in product(_modeling_modules(model), ROUTED):
            if owner := vars(module).get(routed.owner):
                stack.enter_context(_swapped(owner, routed.name, routed.function))
        yield


def _symbolic(builtin: Callable[..., Any], of_two: Callable[..., Any]) -> Callable[..., Any]:
    """`builtin` without asking which of two symbolic sizes is smaller, which makes a graph for some sizes only."""

    def chosen(*args: Any, **kwargs: Any) -> Any:
        is_symbolic = any(isinstance(arg, torch.SymInt) for arg in args)
        if is_symbolic and not kwargs and all(isinstance(arg, int | torch.SymInt) for arg in args):
            return reduce(of_two, args)
        return builtin(*args, **kwargs)

    return chosen


_SYMBOLIC = {"min": _symbolic(min, torch.sym_min), "max": _symbolic(max, torch.sym_max)}


def _chunked_overlay(chunk_size: int, left_padding: Tensor) -> Callable[..., Any]:
    """Without the padding, which rows of a traced batch have none of, and whose tensor cannot be asked."""
    return lambda batch, head, query, key: key // chunk_size == query // chunk_size


@contextmanager
def _swapped(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _shadowed(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """While open, `module` finds `function` before the builtin of that name."""
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        # RWKV divides weights on its first forward, which is to be done to the weights and not to be in the graph.
        getattr(module, "_rescale_layers", lambda: None)()
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
