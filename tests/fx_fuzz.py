"""Random FX graphs: a program is a list of named steps, and building it runs every step on two example sizes.

A step that its examples refuse makes no nodes, so that every built graph runs. What a program makes depends on nothing
but the program; `minimal` drops steps of one that fails for as long as it fails.
"""

from __future__ import annotations

import operator
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from fx_fuzz_impure import DATA_DEPENDENT, EFFECTS, FOREIGN, IMPURE, RANDOM, WRITES
from fx_fuzz_pure import PERHAPS_ITSELF, PURE
from fx_fuzz_root import INPUTS, make_root, restore, state
from torch import Tensor, fx
from torch.fx.node import Target, map_arg
from torch.utils import _pytree as pytree

from autodeploy.graph.meta import ROLE

SIZES = (4, 5)  # n of the example inputs [n, 6]
_MAX_NUMEL = 4096
MOVABLE = "movable"  # meta of a built module: the nodes that a perfect pass would take out
PRODUCTIONS = PURE | IMPURE
ROOT = make_root()
FIRST_STATE = {name: tensor.clone() for name, tensor in state(ROOT).items()}


class Step(NamedTuple):
    """One named production; `a` and `b` are the ids of what it reads: inputs first, then earlier steps."""

    production: str
    a: int
    b: int
    n: int


@dataclass(frozen=True)
class Program:
    """What to build. `outputs` says how the outputs are nested and which are returned beside the unused ones."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: int

    def __str__(self) -> str:
        first = len(self.inputs)
        lines = [f"  {first + index}: {tuple(step)}" for index, step in enumerate(self.steps) if step.production]
        return "\n".join([f"inputs {self.inputs}, outputs {self.outputs}", *lines])


class Refused(Exception):
    """An example could not run a step."""


class Scope:
    """What a production sees: its arguments `x`, `y` (tensors), `k` (an int of the graph), `n` (a small number)."""

    def __init__(self, builder: Builder, step: Step) -> None:
        self.call, self.method, self.module = builder.call, builder.method, builder.module
        self.attribute, self.example = builder.attribute, builder.example
        self._builder, self._step = builder, step
        self.n = step.n

    @property
    def x(self) -> fx.Node:
        return self._builder.tensor(self._step.a)

    @property
    def y(self) -> fx.Node:
        return self._builder.tensor(self._step.b)

    @property
    def k(self) -> fx.Node:
        return self._builder.integer(self._step.b)

    def rank(self, node: fx.Node) -> int:
        return self.example(node).dim()


Production = Callable[[Scope], Any]


class Builder:
    """A graph under construction, each node with its values on the example inputs."""

    def __init__(self, inputs: Sequence[str]) -> None:
        restore(ROOT, FIRST_STATE)
        self.graph = fx.Graph()
        self.values: list[fx.Node | None] = []
        self.made: list[tuple[str, list[fx.Node]]] = []
        self._examples: dict[fx.Node, list[Any]] = {}
        self._versions: dict[fx.Node, int] = {}
        self._written: set[int] = set()  # storages that foreign code was given
        self._shared: list[set[int]] = []  # storages that a pass may take for one
        self._fresh: list[fx.Node] = []
        self._depends: dict[fx.Node, bool] = {}  # on nothing but the layout, by productions that are pure
        for name in inputs:
            node = self.graph.placeholder(name)
            role, make = INPUTS[name]
            ROLE.set(node, role)
            self._keep(node, [make(size, torch.Generator().manual_seed(7)) for size in SIZES])
            self._depends[node] = ROLE.of(node) in ("layout", "constant")
            self.values.append(node)

    def step(self, step: Step) -> bool:
        """Build one step, or nothing; tells which."""
        self._fresh = []
        try:
            made = PRODUCTIONS[step.production](Scope(self, step)) if step.production else None
        except Exception:
            for node in reversed(self._fresh):
                self.graph.erase_node(node)
            self.values.append(None)
            return False
        storages = [_storages(self.example(arg)) for node in self._fresh for arg in (node, *node.all_input_nodes)]
        if step.production in FOREIGN:
            self._written.update(*storages)
        if step.production in PERHAPS_ITSELF or step.production in WRITES:
            self._shared.append(set().union(*storages))
        for node in self._fresh:
            pure = step.production in PURE and all(self._depends[arg] for arg in node.all_input_nodes)
            self._depends[node] = pure and not self._is_parameter(node)
        self.values.append(made)
        self.made.append((step.production, self._fresh))
        return bool(step.production)

    def module_with(self, outputs: int) -> fx.GraphModule:
        """The finished graph; `meta[MOVABLE]` names what a perfect pass would take out of it."""
        results = [node for node in self.graph.nodes if not node.users and node.op != "placeholder"][-10:]
        known = [node for node in self.values if node is not None]
        results += [known[index % len(known)] for index in (outputs // 8, outputs // 64) if known]
        self.graph.output(_nested(results, outputs % 8))
        gm = fx.GraphModule(ROOT, self.graph)
        gm.meta[MOVABLE] = self._movable()
        return gm

    def _movable(self) -> set[str]:
        """Pure tensor computations of layout, sizes and constants that nothing writes to, by torch's own counters."""
        written = self._spread_writes()
        clean: dict[fx.Node, bool] = {}
        reads: dict[fx.Node, bool] = {}
        for node in self._depends:
            args = node.all_input_nodes
            clean[node] = self._depends[node] and all(clean[arg] for arg in args)
            clean[node] &= written.isdisjoint(_storages(self.example(node)))
            is_input = node.op == "placeholder" and ROLE.of(node) == "layout"
            reads[node] = is_input or any(reads[arg] for arg in args)
        return {
            node.name
            for node in self._depends
            if clean[node] and reads[node] and node.op[:4] == "call" and isinstance(self.example(node), Tensor)
        }

    def _spread_writes(self) -> set[int]:
        """Storages that were written to, as far as a pass can tell."""
        values = [(node, self.example(node)) for node in self._depends]
        changed = [_storages(value) for node, value in values if self._versions[node] != _version(value)]
        written = self._written.union(*changed)
        for _ in self._shared:
            written.update(*(group for group in self._shared if group & written))
        return written

    def _is_parameter(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and isinstance(self.example(node), torch.nn.Parameter)

    def example(self, node: fx.Node) -> Any:
        """The value of `node` where n is the first of SIZES."""
        return self._examples[node][0]

    def tensor(self, index: int) -> fx.Node:
        """The value with that id as a tensor node: an item of a list, or an input where it is no tensor."""
        node = self.values[index] if index < len(self.values) else None
        while node is not None and isinstance(self.example(node), list | tuple):
            node = self.call(operator.getitem, node, index % max(1, len(self.example(node))))
        if node is not None and isinstance(self.example(node), Tensor):
            return node
        inputs = [node for node in self.graph.find_nodes(op="placeholder") if isinstance(self.example(node), Tensor)]
        return inputs[index % len(inputs)] if inputs else self.attribute("buffer")

    def integer(self, index: int) -> fx.Node:
        """The value with that id as an int node: the first size of a tensor."""
        node = self.values[index] if index < len(self.values) else None
        if node is not None and type(self.example(node)) is int:
            return node
        return self.call(torch.ops.aten.sym_size.int, self.tensor(index), 0)

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> fx.Node:
        return self._emit("call_function", target, args, kwargs)

    def method(self, target: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._emit("call_method", target, args, kwargs)

    def module(self, target: str, *args: Any) -> fx.Node:
        return self._emit("call_module", target, args, {})

    def attribute(self, name: str) -> fx.Node:
        return self._emit("get_attr", name, (), {})

    def _emit(self, op: str, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        self._fresh.append(node)
        self._keep(node, [self._evaluate(node, world) for world in range(len(SIZES))])
        return node

    def _keep(self, node: fx.Node, values: list[Any]) -> None:
        if any(leaf.numel() > _MAX_NUMEL for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)):
            raise Refused
        self._examples[node] = values
        self._versions[node] = _version(values[0])

    def _evaluate(self, node: fx.Node, world: int) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda arg: self._examples[arg][world])
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        value: Any = ROOT
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value(*args) if node.op == "call_module" else value


def _version(value: Any) -> int:
    return sum(leaf._version for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _storages(value: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}


def build(program: Program) -> fx.GraphModule:
    builder = Builder(program.inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that warns is refused
        for step in program.steps:
            builder.step(step)
    return builder.module_with(program.outputs)


_KINDS = ((PURE, 70), (WRITES, 8), (RANDOM, 3), (EFFECTS, 3), (DATA_DEPENDENT, 3), (FOREIGN, 3))
_NAMES = [list(kind) for kind, _ in _KINDS]
_WEIGHTS = [weight for _, weight in _KINDS]


def random_program(rng: random.Random, num_steps: int = 16) -> Program:
    """Steps that read inputs and what was made of late; one in four repeats an earlier one."""
    inputs = rng.sample(list(INPUTS), rng.choice((0, 2, 4, 6, len(INPUTS))))
    is_wild = rng.random() < 0.6  # whether there is anything but pure steps
    first = len(inputs)
    steps: list[Step] = []
    for place in range(first, first + rng.randint(2, num_steps)):
        if steps and rng.random() < 0.25:
            steps.append(rng.choice(steps))
            continue
        (names,) = rng.choices(_NAMES, _WEIGHTS) if is_wild else _NAMES[:1]
        steps.append(Step(rng.choice(names), _read(rng, first, place), _read(rng, first, place), rng.randrange(24)))
    return Program(tuple(inputs), tuple(steps), rng.randrange(4096))


def _read(rng: random.Random, first: int, place: int) -> int:
    """The id of an input, or of one of the last eight steps."""
    if first and rng.random() < 0.5:
        return rng.randrange(first)
    return rng.randrange(max(0, place - 8), place) if place else 0


def minimal(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A program with fewer steps and smaller numbers that still fails."""
    nothing = Step("", 0, 0, 0)
    for _ in range(4):
        before = program
        for index, step in enumerate(program.steps):
            smaller = [nothing, step._replace(a=0), step._replace(b=0), step._replace(n=0), step._replace(n=1)]
            program = _first_that(
                fails, [_with_step(program, index, each) for each in smaller if each != step], program
            )
        program = _first_that(fails, [replace(program, outputs=outputs) for outputs in (3, 7)], program)
        if program == before:
            break
    return program


def _with_step(program: Program, index: int, step: Step) -> Program:
    return replace(program, steps=(*program.steps[:index], step, *program.steps[index + 1 :]))


def _first_that(fails: Callable[[Program], bool], candidates: list[Program], default: Program) -> Program:
    return next((each for each in candidates if fails(each)), default)


def _nested(results: list[fx.Node], shape: int) -> Any:
    """`results` in one of the forms that a graph may return."""
    if not results:
        return None
    if shape == 0:
        return results[0] if len(results) == 1 else [results[0], tuple(results[1:])]
    if shape == 1:
        return {"first": results[0], "rest": {"list": results[1:], "none": None, "one": 1}}
    if shape == 2:
        return (None, (), (results,), 2.5)
    return tuple(results)
