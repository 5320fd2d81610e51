"""Programs that call one module of torch's own list twice, between reads of its tensors and writes to its input."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
from collections.abc import Iterator
from typing import Any

import torch
from sharing_program import Program, Ref
from sharing_sweep import Sketch, with_refs
from torch import nn


@functools.cache
def module_db() -> list[Any]:
    from torch.testing._internal.common_modules import module_db

    return module_db


def programs(info: Any, rng: random.Random, each: int = 1) -> Iterator[Program]:
    """`each` programs for each of the first constructor's samples, in training and in evaluation."""
    for training in (False, True):
        torch.manual_seed(0)
        samples = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=training)
        for sample in list(samples)[:6]:
            if sample.forward_input is None:
                continue
            root = nn.Module()
            root.m = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            root.m.train(training).requires_grad_(False)
            for _ in range(each):
                yield _program(root, sample.forward_input, rng)


def _program(root: nn.Module, arguments: Any, rng: random.Random) -> Program:
    sketch = Sketch(root)
    args = with_refs(tuple(arguments.args), sketch, "layout")
    kwargs = with_refs(dict(arguments.kwargs), sketch, "layout")
    inputs = list(map(Ref, range(len(sketch.inputs))))
    sketch.start()
    names = [name for name, _ in [*root.named_buffers(), *root.named_parameters()]]
    outputs: list[Ref] = []
    for _ in range(2):
        if names and rng.random() < 0.5:
            outputs.append(sketch.step("method", "clone", sketch.step("attribute", rng.choice(names))))
        if inputs and rng.random() < 0.4:
            with contextlib.suppress(Exception):  # an input of overlapping memory, or of whole numbers
                sketch.step("method", rng.choice(("zero_", "neg_", "exponential_")), rng.choice(inputs))
        made = sketch.step("module", "m", *args, **kwargs)
        for ref in sketch.tensors(made):
            outputs.append(sketch.step("method", "clone", ref) if rng.random() < 0.5 else ref)
    if inputs and rng.random() < 0.5:
        outputs.append(sketch.step("function", operator.add, rng.choice(inputs), 1))
    return Program(tuple(sketch.inputs), tuple(sketch.steps), tuple(outputs), lambda: root)
