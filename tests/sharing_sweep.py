"""Programs that call one operator of torch's own op_db twice, in all its spellings, around writes and views."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from sharing_program import Input, Program, Ref, Step, copy_of, execute, resolve
from torch import Tensor

DTYPES = (torch.int64, torch.float32, torch.bool, torch.complex64, torch.int32, torch.bfloat16)
_MAX_NUMEL = 4096
_NUM_SAMPLES = 8  # the first of an operator's


@dataclass(frozen=True)
class Spelling:
    kind: str
    target: Any
    writes: bool = False


@functools.cache
def op_db() -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db


def spellings(op: Any) -> list[Spelling]:
    """Function, aliases, method, method taken off the class, operators, and their in-place variants."""
    found = [Spelling("function", named(op.op))]
    with contextlib.suppress(AttributeError):  # op_db wraps what is random, and seeds it
        found.append(Spelling("function", named(operator.attrgetter(op.name)(torch))))
    found += [Spelling("function", named(alias.op)) for alias in op.aliases if alias.op is not None]
    methods = [op.method_variant, *(alias.method_variant for alias in op.aliases)]
    for method in methods:
        if hasattr(method, "__name__"):
            found.append(Spelling("method", method.__name__))
    if op.method_variant is not None:
        found.append(Spelling("function", named(op.method_variant)))
    if op.operator_variant is not None:
        found.append(Spelling("function", op.operator_variant))
    if hasattr(op.inplace_variant, "__name__"):
        found.append(Spelling("method", op.inplace_variant.__name__, writes=True))
    if op.inplace_operator_variant is not None:
        found.append(Spelling("function", op.inplace_operator_variant, writes=True))
    found = list(dict.fromkeys(found))
    return [each for each in found if each.kind == "function" or hasattr(Tensor, each.target)]


@functools.cache
def named(function: Callable[..., Any]) -> Callable[..., Any]:
    """FX writes a function down by its name, which a lambda has none of."""
    if getattr(function, "__name__", "<lambda>") != "<lambda>" and not isinstance(function, functools.partial):
        return function

    def foreign(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return foreign


class Sketch:
    """A program under construction, with the value of each place on the first inputs."""

    def __init__(self, root: Any = None) -> None:
        self.root = root
        self.inputs: list[Input] = []
        self.steps: list[Step] = []
        self.values: list[Any] = []

    def input(self, value: Any, role: str = "layout") -> Ref:
        assert not self.steps
        self.inputs.append(Input(role, value))
        self.values.append(value)
        return Ref(len(self.inputs) - 1)

    def start(self) -> None:
        """From here on steps run: on copies, for the inputs are the examples."""
        memory: dict[int, Any] = {}
        self.values = [each.make(0, memory) for each in self.inputs]

    def step(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Ref:
        step = Step(kind, target, args, kwargs)
        self.values.append(execute(step, self.values, self.root))
        self.steps.append(step)
        return Ref(len(self.inputs) + len(self.steps) - 1)

    def value(self, ref: Ref) -> Any:
        return self.values[ref.place]

    def tensors(self, ref: Ref) -> list[Ref]:
        """Places of the tensors that a result consists of."""
        value = self.value(ref)
        if isinstance(value, Tensor):
            return [ref]
        if isinstance(value, (tuple, list)):
            return [
                self.step("function", operator.getitem, ref, index)
                for index, item in enumerate(value)
                if isinstance(item, Tensor)
            ][:3]
        return []

    def program(self, outputs: Any) -> Program:
        return Program(tuple(self.inputs), tuple(self.steps), outputs)


def with_refs(value: Any, sketch: Sketch, role: str) -> Any:
    """The tensors in a sample's arguments become inputs."""
    if isinstance(value, Tensor):
        return sketch.input(value, role)
    if type(value) in (tuple, list):
        return type(value)([with_refs(item, sketch, role) for item in value])
    if isinstance(value, dict):
        return {name: with_refs(item, sketch, role) for name, item in value.items()}
    return value


def literals_of(value: Any, like: Any) -> Any:
    """The arguments `like` with the numbers, names and lists that `value` has in the same places; None where unlike."""
    if isinstance(like, Ref) or isinstance(value, Tensor):
        if isinstance(like, Ref) and isinstance(value, Tensor):
            return like
        raise ValueError
    if isinstance(like, (tuple, list)) and any(isinstance(item, Ref) for item in like):
        if not isinstance(value, (tuple, list)) or len(value) != len(like):
            raise ValueError
        return type(like)([literals_of(one, other) for one, other in zip(value, like, strict=True)])
    if any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(value)):
        raise ValueError
    return value


def samples(op: Any, dtype: torch.dtype, number: int) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = list(islice(op.sample_inputs_func(op, "cpu", dtype, False), number))
    return [sample for sample in found if all(each.numel() <= _MAX_NUMEL for each in _tensors(sample))]


def _tensors(sample: Any) -> Iterator[Tensor]:
    leaves = torch.utils._pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


_VIEWS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("detach", ()),
    ("view_as", (Ref(0),)),
    ("__getitem__", (slice(None),)),
    ("__getitem__", (Ellipsis,)),
    ("contiguous", ()),
    ("alias", ()),
    ("reshape", (-1,)),
    ("expand", (-1,)),
    ("unsqueeze", (0,)),
    ("flatten", ()),
    ("T", ()),
)


class Sweep:
    """One operator's sample in one dtype: random programs that call it twice."""

    def __init__(self, op: Any, found: list[Any], rng: random.Random) -> None:
        self.op, self.samples, self.rng = op, found, rng

    def program(self, spelling: Spelling, index: int) -> Program:
        rng, sketch = self.rng, Sketch()
        sample = self.samples[index]
        role = rng.choice(["layout", "layout", "layout", "tokens"]) if rng.random() < 0.3 else "layout"
        arguments = with_refs((sample.input, *sample.args), sketch, "layout")
        kwargs = with_refs(sample.kwargs, sketch, role)
        inputs = [Ref(place) for place in range(len(sketch.inputs))]
        others = [sketch.input(copy_of(sketch.values[ref.place], 1, {}), "layout") for ref in inputs]
        tokens = sketch.input(torch.ones(2), "tokens")
        sketch.start()
        calls: list[Ref] = []
        views: list[Ref] = []
        base = arguments[0] if isinstance(arguments[0], Ref) else None
        if base is not None and rng.random() < 0.3:
            view = self.view(sketch, base)
            views.append(view)
            if rng.random() < 0.6:
                arguments = (view, *arguments[1:])
        for _ in range(2):
            self.event(sketch, inputs, others, views, calls)
            calls.append(self.call(sketch, spelling, arguments, kwargs))
        self.event(sketch, inputs, others, views, calls)
        return sketch.program(self.outputs(sketch, calls, inputs, views, tokens))

    def view(self, sketch: Sketch, base: Ref) -> Ref:
        for _ in range(4):
            name, args = self.rng.choice(_VIEWS)
            try:
                if name == "T":
                    return sketch.step("function", getattr, base, "T")
                if name == "view_as":
                    args = (base,)
                if name == "alias":
                    return sketch.step("function", torch.ops.aten.alias.default, base)
                return sketch.step("method", name, base, *args)
            except Exception:
                continue
        return base

    def call(self, sketch: Sketch, spelling: Spelling, args: Any, kwargs: Any) -> Ref:
        """The call, with the arguments of another sample at times, by name or by position, and `out=`."""
        rng = self.rng
        if rng.random() < 0.35:
            other = rng.choice(self.samples)
            try:
                args = (args[0], *literals_of(list(other.args), list(args[1:])))
                kwargs = {name: literals_of(value, kwargs.get(name)) for name, value in other.kwargs.items()}
            except ValueError:
                pass
        if rng.random() < 0.15:
            args, kwargs = self.perturbed(args), self.perturbed(kwargs)
        if spelling.writes and rng.random() < 0.5:
            args = (sketch.step("method", "clone", args[0]), *args[1:])
        if self.op.supports_out and spelling.kind == "function" and not spelling.writes and rng.random() < 0.15:
            example = spelling.target(*copies(sketch, args), **copies(sketch, kwargs))
            if isinstance(example, Tensor):
                out = sketch.step("function", torch.zeros_like, args[0])
                out = sketch.step("method", "new_zeros", out, tuple(example.shape), dtype=example.dtype)
                kwargs = {**kwargs, "out": out}
        return sketch.step(spelling.kind, spelling.target, *args, **kwargs)

    def perturbed(self, value: Any) -> Any:
        """Some literals as other types of the same value, or with another sign of zero."""
        rng = self.rng
        if isinstance(value, (tuple, list)):
            return type(value)([self.perturbed(item) for item in value])
        if isinstance(value, dict):
            return {name: self.perturbed(item) for name, item in value.items()}
        if type(value) in (int, float, bool, complex) and rng.random() < 0.5:
            return rng.choice([value, float(value.real), int(value.real), bool(value), -0.0, 0, False, complex(value)])
        return value

    def event(self, sketch: Sketch, inputs: list[Ref], others: list[Ref], views: list[Ref], calls: list[Ref]) -> None:
        """Perhaps a write: to an input, through a view, or to a result."""
        rng = self.rng
        chosen = rng.random()
        if chosen < 0.55:
            return
        try:
            if chosen < 0.7 and inputs:
                place = rng.randrange(len(inputs))
                sketch.step("method", "copy_", inputs[place], others[place])
            elif chosen < 0.8 and views:
                sketch.step("method", "copy_", views[0], sketch.step("method", "flip", views[0], (0,)))
            elif calls:
                results = sketch.tensors(rng.choice(calls))
                if results:
                    self.write(sketch, rng.choice(results))
        except Exception:
            return

    def write(self, sketch: Sketch, ref: Ref) -> None:
        kind = self.rng.randrange(5)
        if kind == 0:
            sketch.step("method", "zero_", ref)
        elif kind == 1:
            sketch.step("method", "fill_", ref, 1)
        elif kind == 2:
            sketch.step("function", operator.setitem, ref, Ellipsis, 2)
        elif kind == 3:
            sketch.step("function", operator.iadd, ref, 1)
        else:
            sketch.step("function", torch.ops.aten.fill_.Scalar, ref, 3)

    def outputs(self, sketch: Sketch, calls: list[Ref], inputs: list[Ref], views: list[Ref], tokens: Ref) -> Any:
        rng = self.rng
        kept: list[Ref] = []
        for call in calls:
            chosen = rng.random()
            if chosen < 0.4:
                kept.append(call)
            elif chosen < 0.5:
                kept += [call, call]
            else:
                kept += [sketch.step("method", "clone", ref) for ref in sketch.tensors(call)] or [call]
        if rng.random() < 0.3:
            kept.append(sketch.step("method", "add", tokens, 1))
        if rng.random() < 0.2:
            kept += rng.choice([inputs, views])[:1]
        return tuple(kept)


def copies(sketch: Sketch, value: Any) -> Any:
    resolved = resolve(value, sketch.values)
    return torch.utils._pytree.tree_map_only(Tensor, lambda each: each.clone(), resolved)


def programs(op: Any, rng: random.Random, each: int = 1) -> Iterator[Program]:
    """Programs of one operator: in two dtypes, in every spelling, `each` over random samples."""
    for found in _some_samples(op, rng):
        sweep = Sweep(op, found, rng)
        for spelling in spellings(op) * each:
            with contextlib.suppress(Exception):  # a spelling that does not take the sample
                yield sweep.program(spelling, rng.randrange(len(found)))


def calls(op: Any, rng: random.Random, each: int = 1) -> Iterator[tuple[Step, list[Any]]]:
    """Single calls in two dtypes, in every spelling, over `each` random samples: steps, and the values they read."""
    for found in _some_samples(op, rng):
        for sample in rng.sample(found, min(each, len(found))):
            for spelling in spellings(op):
                sketch = Sketch()
                args = with_refs((sample.input, *sample.args), sketch, "layout")
                kwargs = with_refs(sample.kwargs, sketch, "layout")
                sketch.start()
                yield Step(spelling.kind, spelling.target, args, kwargs), sketch.values


def _some_samples(op: Any, rng: random.Random) -> Iterator[list[Any]]:
    """The first samples in each of two random dtypes that the operator takes."""
    supported = [dtype for dtype in DTYPES if dtype in op.supported_dtypes("cpu")]
    for dtype in rng.sample(supported, min(2, len(supported))):
        with contextlib.suppress(Exception):  # some samples cannot be made on a CPU, or without a library
            if found := samples(op, dtype, _NUM_SAMPLES):
                yield found
