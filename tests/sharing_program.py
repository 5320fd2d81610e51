"""A program as plain data: inputs, steps, outputs. Run eagerly it says what is right; built as a graph it is the test.

Nothing here knows the passes. A step names a function, method, attribute or module, and its arguments hold `Ref`s.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from autodeploy.graph.meta import CONSTANT, ROLE, VALUE

CONSTANT_NAME = "_tensor_constant"  # tracers call literals so


@dataclass(frozen=True)
class Ref:
    """The value at one place: inputs first, then the results of steps."""

    place: int


@dataclass(frozen=True)
class Step:
    """One node: `kind` is "function", "method", "attribute" or "module"."""

    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """A graph input: a tensor or a number, and the role that it has in graphs with roles."""

    role: str
    example: Any

    def make(self, variant: int, memory: dict[int, torch.UntypedStorage], grows: bool = False) -> Any:
        """Equal values for equal variants, 0 and 1; inputs made over one `memory` share it as the examples do."""
        if not isinstance(self.example, Tensor):
            return self.example
        return grown(self.example) if variant and grows else copy_of(self.example, variant, memory)


def grown(tensor: Tensor) -> Tensor:
    """With other sizes wherever one is 3 or 4: what was a traced size must still be read, not known."""
    for dim, size in enumerate(tensor.shape):
        if size in (3, 4):
            tensor = tensor.index_select(dim, torch.arange(size + 2) % size)
    return tensor.clone()


def copy_of(tensor: Tensor, variant: int, memory: dict[int, torch.UntypedStorage]) -> Tensor:
    """The same strides and, for tensors that share memory, shared memory; variant 1 has the same values elsewhere."""
    if tensor.layout is not torch.strided:
        return tensor.clone()
    old = tensor.untyped_storage()
    if old._cdata not in memory:
        flat = torch.empty(0, dtype=tensor.dtype).set_(old)  # type: ignore[call-overload]
        new = torch.roll(flat, variant) if variant else flat.clone()
        memory[old._cdata] = new.untyped_storage()
    made = torch.empty(0, dtype=tensor.dtype)
    made.set_(memory[old._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
    made = torch._conj(made) if tensor.is_conj() else made
    return torch._neg_view(made) if tensor.is_neg() else made


def no_module() -> nn.Module:
    return nn.Module()


@dataclass(frozen=True)
class Program:
    """What to run. `outputs` is any nest of tuples, lists and dicts with Refs.

    Without roles, integers are the layout, and inputs may share memory. If it `grows`, the second run has other sizes.
    """

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: Any
    root: Callable[[], nn.Module] = no_module
    has_roles: bool = True
    grows: bool = False

    def make_inputs(self, variant: int = 0) -> list[Any]:
        memory: dict[int, torch.UntypedStorage] = {}
        return [each.make(variant, memory, self.grows) for each in self.inputs]

    def attributes(self) -> set[str]:
        """Names of what the steps use of the root."""
        return {step.target for step in self.steps if step.kind in ("attribute", "module")}

    def run(self, root: Any, *inputs: Any) -> Any:
        """Eager; traceable, too."""
        values = list(inputs)
        for step in self.steps:
            values.append(execute(step, values, root))
        return resolve(self.outputs, values)

    def __str__(self) -> str:
        names = [f"input {each.role if self.has_roles else 'without a role'}" for each in self.inputs]
        names = [f"v{place} = {name}: " for place, name in enumerate(names)]
        lines = [name + describe(each.example) for name, each in zip(names, self.inputs, strict=True)]
        lines += [f"v{len(self.inputs) + place} = {spell(step)}" for place, step in enumerate(self.steps)]
        return "\n".join([*lines, f"return {show(self.outputs)}"])


def resolve(value: Any, values: list[Any]) -> Any:
    """`value` with every Ref replaced by what it stands for."""
    kind = type(value)
    if kind is Ref:
        return values[value.place]
    if kind in (tuple, list):
        return kind([resolve(item, values) for item in value])
    if kind is dict:
        return {key: resolve(item, values) for key, item in value.items()}
    if kind is slice:
        return slice(*(resolve(item, values) for item in (value.start, value.stop, value.step)))
    return value


def refs(value: Any) -> Iterator[Ref]:
    """Every Ref in `value`."""
    if type(value) is Ref:
        yield value
    elif isinstance(value, (tuple, list)):
        yield from itertools.chain.from_iterable(map(refs, value))
    elif isinstance(value, dict):
        yield from refs(list(value.values()))
    elif isinstance(value, slice):
        yield from refs((value.start, value.stop, value.step))


def execute(step: Step, values: list[Any], root: Any) -> Any:
    if step.kind == "attribute":
        return named(root, step.target)
    args, kwargs = resolve(step.args, values), resolve(step.kwargs, values)
    if step.kind == "function":
        return step.target(*args, **kwargs)
    if step.kind == "method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return named(root, step.target)(*args, **kwargs)


def named(root: Any, name: str) -> Any:
    """The attribute or submodule with a dotted name."""
    return functools.reduce(getattr, name.split("."), root)


_OPS = {"function": "call_function", "method": "call_method", "attribute": "get_attr", "module": "call_module"}


def build(program: Program, root: nn.Module | dict[str, Any]) -> fx.GraphModule:
    """The graph with one node for each step, over the attributes and modules of `root`."""
    graph = fx.Graph()
    nodes: list[Any] = []
    for place, each in enumerate(program.inputs):
        nodes.append(graph.placeholder(f"v{place}"))
        if program.has_roles:
            ROLE.set(nodes[-1], each.role)
        else:
            VALUE.set(nodes[-1], each.example)
    for step in program.steps:
        nodes.append(add_node(graph, step, nodes))
    graph.output(resolve(program.outputs, nodes))
    return fx.GraphModule(root, graph)


def add_node(graph: fx.Graph, step: Step, nodes: list[Any]) -> fx.Node:
    node = graph.create_node(_OPS[step.kind], step.target, resolve(step.args, nodes), resolve(step.kwargs, nodes))
    if step.kind == "attribute" and step.target.startswith(CONSTANT_NAME):
        CONSTANT.set(node, True)
    return node


def without_input(program: Program, place: int) -> Program:
    """The program without an input that nothing reads."""
    names = [Ref(old - (old > place)) for old in range(len(program.inputs) + len(program.steps))]
    inputs = program.inputs[:place] + program.inputs[place + 1 :]
    steps = tuple(_renamed(step, names) for step in program.steps)
    return replace(program, inputs=inputs, steps=steps, outputs=resolve(program.outputs, names))


def without_step(program: Program, index: int) -> Program | None:
    """The program without a step and without all that reads it; None where nothing is left to return."""
    first = len(program.inputs)
    names: list[Any] = list(map(Ref, range(first)))
    steps: list[Step] = []
    for place, step in enumerate(program.steps):
        if place == index or any(names[ref.place] is None for ref in refs((step.args, step.kwargs))):
            names.append(None)
            continue
        names.append(Ref(first + len(steps)))
        steps.append(_renamed(step, names))
    outputs = tuple(names[out.place] for out in refs(program.outputs) if names[out.place] is not None)
    return replace(program, steps=tuple(steps), outputs=outputs) if outputs else None


def _renamed(step: Step, names: list[Any]) -> Step:
    return replace(step, args=resolve(step.args, names), kwargs=resolve(step.kwargs, names))


def show(value: Any) -> str:
    """`value` as code, with v3 for Ref(3)."""
    if type(value) is Ref:
        return f"v{value.place}"
    if isinstance(value, tuple):
        return f"({', '.join(map(show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {show(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({show(value.start)}, {show(value.stop)}, {show(value.step)})"
    return repr(value)


def spell(step: Step) -> str:
    args = [show(arg) for arg in step.args] + [f"{name}={show(arg)}" for name, arg in step.kwargs.items()]
    if step.kind == "attribute":
        return f"self.{step.target}"
    if step.kind == "method":
        return f"{args[0]}.{step.target}({', '.join(args[1:])})"
    name = f"self.{step.target}" if step.kind == "module" else _function_name(step.target)
    return f"{name}({', '.join(args)})"


def _function_name(target: Any) -> str:
    module = getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__name__", "")
    name = getattr(target, "__name__", None)
    return str(target) if name is None or "." in str(target)[:6] else f"{module}.{name}"


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    text = str(value.tolist()) if value.layout is torch.strided and value.numel() <= 8 else "..."
    strides = "" if value.layout is not torch.strided or value.is_contiguous() else f", strides {value.stride()}"
    return f"{value.dtype} {tuple(value.shape)}{strides} {text}"
