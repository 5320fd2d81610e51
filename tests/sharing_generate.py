"""Random programs from the table of `sharing_table`, run eagerly while they are made so that every one of them runs.

Almost half of the steps repeat an earlier one, whole or with one thing changed: an argument's value, its type, its
name, whether it is given at all, how the op is spelled. What a careless key takes for equal is made of those.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sharing_oracle import State, tensors_of
from sharing_program import Program, Ref, Step, copy_of, execute, resolve
from sharing_steps import STEPS, with_attribute
from sharing_table import DOMAINS, DTYPES, NUMBERS, TABLE, WRITES, Argument, Line, lines
from sharing_world import ATTRIBUTES, TWINS, inputs, world
from torch import Tensor
from torch._ops import OpOverload

_MAX_NUMEL = 200
_SCHEMA_NAMES = {"self": "input"}
_READS, _WRITES = lines(TABLE), lines(WRITES)
# Not a torch function, though the module has one of that name.
_NOT_TORCH = {"to", "float", "long", "int", "bool", "double", "cpu", "real", "set_", "view", "expand", "new_tensor"}


@functools.cache
def _state() -> State:
    return State(tensors_of(world()))


class Refused(Exception):
    """No such step on these values."""


class Broken(Exception):
    """Torch let a step make a tensor that reaches beyond its memory, or has a negative size."""


def _is_sound(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return True
    if min(value.shape, default=0) < 0 or min(value.stride(), default=0) < 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    end = (value.storage_offset() + last + 1) * value.element_size()
    return 0 in value.shape or end <= value.untyped_storage().nbytes()


def _has_least_integer(value: Tensor) -> bool:
    """Dividing the least integer by -1 ends the process (torch 2.13)."""
    return value.dtype in (torch.int64, torch.int32) and bool((value == torch.iinfo(value.dtype).min).any())


def _ends_the_process(target: Any, arguments: Any) -> bool:
    """Whether torch 2.13 divides integers by False in here, or takes a whole number for a dtype, without looking."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    args, kwargs = arguments
    if isinstance(target, OpOverload):
        given = zip(target._schema.arguments, args, strict=False)
        given = [*given, *((arg, kwargs.get(arg.name)) for arg in target._schema.arguments)]
        if any(type(value) is int and "ScalarType" in str(arg.real_type) for arg, value in given):
            return True
    if not any(part in name for part in ("remainder", "fmod", "mod")):
        return False
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return any(isinstance(leaf, bool) or getattr(leaf, "dtype", None) is torch.bool for leaf in leaves)


# How often a program takes its steps from where.
MOODS = (
    {"reads": 50, "writes": 17, "others": 33},
    {"reads": 85, "others": 15},
    {"attributes": 50, "reads": 25, "writes": 10, "others": 15},
)


class Generator:
    """One program in the making, with the value of each place on the first inputs."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.mood = rng.choice(MOODS)
        self.has_roles = rng.random() < 0.65
        self.inputs = inputs(rng, may_share=not self.has_roles)
        memory: dict[int, Any] = {}
        self.values = [each.make(0, memory) for each in self.inputs]
        self.steps: list[Step] = []
        self.autocasts: list[Ref] = []

    def program(self, num_steps: int) -> Program:
        tries = 0
        while len(self.steps) < num_steps and tries < 4 * num_steps:
            tries += 1
            try:
                self.add(self.choose())
            except Broken:
                raise
            except Exception:  # the values do not allow it
                if not all(map(_is_sound, self.values)):
                    raise Broken from None
        while self.autocasts:
            self.add(Step("function", torch.amp.autocast_mode._exit_autocast, (self.autocasts.pop(),)))
        outputs, grows = self.outputs(), self.rng.random() < 0.2
        return Program(self.inputs, tuple(self.steps), outputs, world, self.has_roles, grows)

    def add(self, step: Step) -> Ref:
        if _ends_the_process(step.target, resolve((step.args, step.kwargs), self.values)):
            raise Refused
        value = execute(step, self.values, world())
        if isinstance(value, Tensor) and (value.numel() > _MAX_NUMEL or _has_least_integer(value)):
            raise Refused
        self.values.append(value)
        if not all(map(_is_sound, self.values)):
            raise Broken
        self.steps.append(step)
        return Ref(len(self.values) - 1)

    def choose(self) -> Step:
        if self.steps and self.rng.random() < 0.4:
            return self.again(self.rng.choice(self.steps))
        (kind,) = self.rng.choices(list(self.mood), list(self.mood.values()))
        if kind == "attributes":
            return with_attribute(self)
        if kind == "others":
            return self.rng.choice(STEPS)(self)
        return self.call(self.rng.choice(_READS if kind == "reads" else _WRITES))

    # Steps from the table.

    def call(self, line: Line) -> Step:
        """A call of one line of the table, in a random spelling."""
        given = []
        for argument in line.arguments:
            if argument.is_optional and self.rng.random() < 0.6:
                continue
            given.append((argument, self.argument(argument)))
        return self.spelled(line, given)

    def spelled(self, line: Line, given: list[tuple[Argument, Any]]) -> Step:
        rng = self.rng
        kinds = ["aten", "packet"]
        if hasattr(Tensor, line.name) and given and given[0][0].name in ("self", "weight"):
            kinds += ["method"] * 2 + ["descriptor"]
        if hasattr(torch, line.name) and line.name not in _NOT_TORCH:
            kinds += ["torch"] * 2
        if hasattr(F, line.name):
            kinds.append("functional")
        kind = rng.choice(kinds)
        args, kwargs = self.arranged(line, given, kind)
        if kind == "method":
            return Step("method", line.name, args, kwargs)
        if kind == "descriptor":
            return Step("function", getattr(Tensor, line.name), args, kwargs)
        if kind == "torch":
            return Step("function", getattr(torch, line.name), args, kwargs)
        if kind == "functional":
            return Step("function", getattr(F, line.name), args, kwargs)
        packet = getattr(torch.ops.aten, line.name, None)
        if packet is None:
            raise Refused
        if kind == "packet" and line.name != "to":  # the packet `aten.to` ends the process (torch 2.13)
            return Step("function", packet, args, kwargs)
        return Step("function", self.overload(packet, args, kwargs), args, kwargs)

    def overload(self, packet: Any, args: Any, kwargs: Any) -> Any:
        """The first overload, in random order, that takes the arguments."""
        names = [name for name in packet.overloads() if "out" not in name and "prim" not in name]
        self.rng.shuffle(names)
        values = resolve((args, kwargs), self.values)
        for name in names[:6]:
            overload = getattr(packet, name)
            if _ends_the_process(overload, values):
                continue
            memory: dict[int, Any] = {}
            copied = torch.utils._pytree.tree_map_only(Tensor, lambda each, m=memory: copy_of(each, 0, m), values)
            try:
                overload(*copied[0], **copied[1])
            except Exception:
                continue
            return overload
        raise Refused

    def arranged(
        self, line: Line, given: list[tuple[Argument, Any]], kind: str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """By position as long as nothing was left out, and by name from some argument on."""
        names = [argument.name for argument in line.arguments]
        by_name = self.rng.randrange(len(names) + 2) if self.rng.random() < 0.3 else len(names)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for argument, value in given:
            place = names.index(argument.name)
            is_receiver = place == 0 and kind in ("method", "descriptor")
            if (place == len(args) and place < by_name and not argument.by_name and not kwargs) or is_receiver:
                args.append(value)
            else:
                name = argument.name
                kwargs["input" if name == "self" and kind in ("torch", "functional") else name] = value
        return tuple(args), kwargs

    def argument(self, argument: Argument) -> Any:
        rng = self.rng
        domain = argument.domain
        if domain in _FROM_VALUES:
            return _FROM_VALUES[domain](self)
        value = DOMAINS[domain](rng)
        if rng.random() < 0.06 and (ref := self.pick(lambda each: type(each) is int and -3 < each < 7)) is not None:
            if type(value) is int:
                return ref
            if type(value) in (list, tuple) and value and all(type(item) is int for item in value):
                return type(value)([ref, *value[1:]])
        return value

    # Values of the program.

    def pick(self, test: Callable[[Any], bool]) -> Ref | None:
        """A place whose value passes `test`, late ones and inputs more often."""
        places = [place for place, value in enumerate(self.values) if test(value)]
        if not places:
            return None
        if self.rng.random() < 0.4:
            places = places[-3:]
        return Ref(self.rng.choice(places))

    def need(self, test: Callable[[Any], bool]) -> Ref:
        ref = self.pick(test)
        if ref is None:
            raise Refused
        return ref

    def tensor(self) -> Ref:
        return self.need(lambda value: isinstance(value, Tensor))

    def typed(self, *dtypes: torch.dtype) -> Ref:
        return self.need(lambda value: isinstance(value, Tensor) and value.dtype in dtypes)

    def other(self) -> Any:
        chosen = self.rng.random()
        if chosen < 0.55:
            return self.tensor()
        if chosen < 0.65 and (ref := self.pick(lambda value: type(value) in (int, float, bool))) is not None:
            return ref
        return self.rng.choice(NUMBERS)

    def row(self) -> Ref:
        return self.need(lambda value: isinstance(value, Tensor) and value.dim() == 1)

    # The same step again, or nearly.

    def again(self, step: Step) -> Step:
        rng = self.rng
        chosen = rng.random()
        if chosen < (0.1 if step.kind == "attribute" else 0.4):
            return step
        args, kwargs = list(step.args), dict(step.kwargs)
        if chosen < 0.8 and (args or kwargs):
            literals = [place for place, arg in enumerate(args) if type(arg) is not Ref]
            if kwargs and (rng.random() < 0.5 or not literals):
                name = rng.choice(list(kwargs))
                kwargs[name] = self.nearly(kwargs[name])
            elif args:
                place = rng.choice(literals or range(len(args)))
                args[place] = self.nearly(args[place])
        elif chosen < 0.9:
            if kwargs:
                del kwargs[rng.choice(list(kwargs))]
            elif len(args) > 1:
                args.pop()
        elif chosen < 0.95 and kwargs:
            return Step(step.kind, step.target, tuple(args), dict(reversed(kwargs.items())))
        elif step.kind == "method" and (function := getattr(torch, step.target, None)) is not None:
            return Step("function", function, tuple(args), kwargs)
        elif step.kind == "attribute":
            return Step("attribute", rng.choice(TWINS.get(step.target, ATTRIBUTES)))
        return Step(step.kind, step.target, tuple(args), kwargs)

    def nearly(self, value: Any) -> Any:
        """Another value, one of another type that Python calls equal, or the same."""
        rng = self.rng
        kind = type(value)
        if kind is Ref:
            same = type(self.values[value.place])
            return self.need(lambda each: isinstance(each, same))
        if kind is bool:
            return rng.choice([not value, int(value), float(value)])
        if kind in (int, float):
            whole = int(value) if math.isfinite(value) else 0
            return rng.choice([whole, float(value), float(value), -value, whole + 1, bool(value), whole - 1])
        if kind is complex:
            return rng.choice([-value, value.conjugate(), value.real])
        if kind in (tuple, list) and value:
            place = rng.randrange(len(value))
            changed = [*value[:place], self.nearly(value[place]), *value[place + 1 :]]
            return rng.choice([tuple, list])(changed)
        if kind is slice:
            return slice(value.start, value.stop, rng.choice([None, 1, 2]))
        if kind is torch.dtype:
            return rng.choice(DTYPES)
        return value

    # What is returned.

    def outputs(self) -> Any:
        """Most values of the end, some twice, in a nest."""
        rng = self.rng
        places = [place for place, value in enumerate(self.values) if _can_return(value)]
        number = rng.randint(1, 5)
        chosen = [Ref(place) for place in rng.sample(places, min(number, len(places)))]
        late = [place for place in places[-4:] if rng.random() < 0.7]
        found: list[Any] = [self.kept_apart(ref) for ref in [*chosen, *map(Ref, late)]] or [Ref(0)]
        if rng.random() < 0.15:
            found.append(found[0])
        if rng.random() < 0.2:
            return {"first": found[0], "rest": [found[1:], (found[-1],)]}
        return tuple(found)

    def kept_apart(self, ref: Ref) -> Ref:
        """The value, or more often a copy: two values that both reach the caller can never be one."""
        if self.rng.random() < 0.4 or not isinstance(self.values[ref.place], Tensor):
            return ref
        try:
            return self.add(self.rng.choice((Step("method", "clone", (ref,)), Step("function", torch.neg, (ref,)))))
        except Exception:
            return ref


def _can_return(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_can_return(item) for item in value)
    return isinstance(value, (Tensor, int, float, complex, torch.dtype))


def _tensors(generator: Generator) -> Any:
    found = [generator.tensor() for _ in range(generator.rng.randint(1, 3))]
    return generator.rng.choice([list, tuple])(found)


def _mask(generator: Generator) -> Ref:
    return generator.typed(torch.bool)


def _index(generator: Generator) -> Ref:
    return generator.typed(torch.int64, torch.int32)


def _rows(generator: Generator) -> Ref:
    return generator.need(
        lambda value: isinstance(value, Tensor) and value.dim() < 2 and value.dtype in (torch.int64, torch.int32)
    )


def _indices(generator: Generator) -> Any:
    return generator.rng.choice([list, tuple])(
        generator.rng.choice([[_index(generator)], [None, _index(generator)], [_index(generator), _index(generator)]])
    )


_FROM_VALUES: dict[str, Callable[[Generator], Any]] = {
    "self": Generator.tensor,
    "tensor": Generator.tensor,
    "other": Generator.other,
    "mask": _mask,
    "index": _index,
    "rows": _rows,
    "row": Generator.row,
    "tensors": _tensors,
    "indices": _indices,
}


def generate(rng: random.Random) -> Program:
    while True:
        _state().restore()
        with contextlib.suppress(Broken):
            return Generator(rng).program(rng.choice((3, 4, 5, 6, 8, 8, 10, 14)))


def programs(seed: int) -> Iterator[Program]:
    rng = random.Random(seed)
    while True:
        yield generate(rng)
