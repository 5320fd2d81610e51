"""The invariants of a graph between passes, as checks: each returns None or raises InvariantError.

A graph is typed where every node that makes a value has it recorded (`autodeploy.values`). One that comes typed stays
so: after each pass no value is missing, and where values are checked in full, none is wrong. One that comes without,
such as that of `fx.symbolic_trace`, need not have any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils import _pytree as pytree

from autodeploy.errors import InvariantError
from autodeploy.graph.dependence import Split
from autodeploy.graph.edit import PREPARE, prepare_nodes
from autodeploy.graph.location import node_location
from autodeploy.graph.meta import SITE, VALUE
from autodeploy.graph.values import Propagation, missing, mode_of, symbolic


def check(gm: fx.GraphModule, parts: Split, *, typed: bool = False) -> None:
    """Every invariant that holds for the stage `gm` is in; those of a later stage are vacuous.

    `parts` is `dependence.split(gm)`, `typed` whether the graph came typed. Raises InvariantError naming the node.
    """
    if typed:
        check_no_value_is_missing(gm)
    prepares = prepare_nodes(gm)
    if not prepares:
        return
    check_one_prepare(prepares)
    check_prepare_is_first(prepares[0], parts)
    check_nothing_left_outside(parts)
    check_reads_come_from_prepare(gm, prepares[0], parts)


def check_one_prepare(prepares: list[fx.Node]) -> None:
    """Exactly one prepare_metadata node."""
    if len(prepares) != 1:
        raise InvariantError(f"{len(prepares)} {PREPARE} nodes instead of one", where=node_location(prepares[1]))


def check_prepare_is_first(prepare: fx.Node, parts: Split) -> None:
    """It comes right after the inputs; nothing but sizes, which are free, stands between."""
    node = prepare.prev
    while node.op != "root":
        if node.op not in ("placeholder", "get_attr") and node not in parts.scalars:
            raise InvariantError(f"{PREPARE} does not come right after the inputs", where=node_location(node))
        node = node.prev


def check_nothing_left_outside(parts: Split) -> None:
    """No layout-only computation is left outside."""
    left = parts.metadata
    if left:
        raise InvariantError(
            f"{len(left)} layout-only nodes outside {PREPARE}, such as {left[0].format_node()}",
            where=node_location(left[0]),
        )


def check_reads_come_from_prepare(gm: fx.GraphModule, prepare: fx.Node, parts: Split) -> None:
    """Every cached attention node reads metadata only from prepare_metadata or from graph inputs.

    What is computed from constants alone is no metadata: the decays of a layer may be.
    """
    constant: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
        if not SITE.on(node):
            continue
        for arg in node.all_input_nodes:
            is_computed = (
                arg in parts.known and arg not in constant and arg.op == "call_function" and arg not in parts.scalars
            )
            if is_computed and arg.all_input_nodes != [prepare]:
                raise InvariantError(
                    f"attention reads {arg.name}, which is not an output of {PREPARE}", where=node_location(node)
                )


def is_typed(gm: fx.GraphModule) -> bool:
    """Whether every node of `gm`, and of its prepare_metadata, that makes a value has it recorded."""
    return mode_of(gm.graph) is not None and not _missing(gm)


def check_no_value_is_missing(gm: fx.GraphModule) -> None:
    """Every value of `gm`, and of its prepare_metadata, is recorded."""
    for node in _missing(gm):
        raise InvariantError(
            f"the value of {node.name} is not recorded",
            where=node_location(node),
            fix="call autodeploy.extend.record_values on new nodes",
        )


def _missing(gm: fx.GraphModule) -> list[fx.Node]:
    inner = getattr(gm, PREPARE) if prepare_nodes(gm) else None
    return missing(gm.graph) + (missing(inner.graph) if inner else [])


def check_values(gm: fx.GraphModule) -> None:
    """Every recorded value is what torch makes of the inputs' values: dtype, device, shape, strides, numbers.

    Runs the whole graph on fake tensors, a tenth to a third of what tracing it took.
    """
    mode = mode_of(gm.graph)
    if mode is None:
        return
    inputs = [VALUE.of(node) for node in gm.graph.find_nodes(op="placeholder")]
    with symbolic():
        _Comparison(gm, mode).propagate_dont_convert_inputs(*inputs)


class _Comparison(Propagation):
    """Propagates, compares each value with the recorded one, and records nothing."""

    def run_node(self, n: fx.Node) -> Any:
        recorded = dict(n.meta)
        try:
            result = super().run_node(n)
            computed = VALUE.get(n)
        finally:
            n.meta = recorded
        if n.op != "output" and VALUE.on(n) and (why := _difference(VALUE.of(n), computed, self._mode)):
            raise InvariantError(f"the recorded value of {n.name} is wrong: {why}", where=node_location(n))
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inner = self.fetch_attr(str(target))
        if target != PREPARE or not isinstance(inner, fx.GraphModule):
            return super().call_module(target, args, kwargs)
        return _Comparison(inner, self._mode).run(*args)


def _difference(recorded: Any, computed: Any, mode: FakeTensorMode) -> str | None:
    """None where two values are the same, else what of it differs."""
    ones, others = pytree.tree_leaves(recorded), pytree.tree_leaves(computed)
    if len(ones) != len(others):
        return f"{len(ones)} values, where there are {len(others)}"
    for one, other in zip(ones, others, strict=True):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if type(one) is not type(other) or not statically_known_true(one == other):
                return f"{one}, where it is {other}"
            continue
        if isinstance(one, FakeTensor) and one.fake_mode is not mode:
            return "a fake tensor of another mode"
        for what in ("dtype", "device", "layout", "shape", "stride"):
            pair = [getattr(each, what)() if what == "stride" else getattr(each, what) for each in (one, other)]
            if not statically_known_true(sym_eq(*pair) if what in ("shape", "stride") else pair[0] == pair[1]):
                return f"{what} {pair[0]}, where it is {pair[1]}"
    return None


@dataclass
class ValueChecker:
    """Observer that checks every value before the first pass and after each. Raises InvariantError naming the pass."""

    _is_typed: bool = field(default=False, init=False)
    _has_begun: bool = field(default=False, init=False)

    def before(self, step: Any, gm: fx.GraphModule) -> None:
        if not self._has_begun:
            self._has_begun, self._is_typed = True, is_typed(gm)
            self._check(gm, "the graph as it came")

    def after(self, step: Any, gm: fx.GraphModule, record: Any) -> None:
        self._check(gm, step.name)

    def _check(self, gm: fx.GraphModule, stage: str) -> None:
        if not self._is_typed:
            return
        try:
            check_values(gm)
        except InvariantError as error:
            error.add_note(f"  pass:  {stage}")
            raise
