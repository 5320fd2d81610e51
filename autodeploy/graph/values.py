"""The value of every node: in `meta["val"]` a fake tensor (or number, or several) of what the node makes.

A value is computed by running the node's own op under the fake mode of its graph; no shape rule is ours. Models repeat
their layers, so an op that is called again on arguments of the same dtypes, shapes, strides and devices is not run
again: nodes may share one fake tensor object, which therefore says nothing of storage. Bodies of higher-order ops are
left to whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import snapshot_fake
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_aggregate, map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.utils import _pytree as pytree

from autodeploy.errors import InvariantError
from autodeploy.graph.location import node_location
from autodeploy.graph.meta import UNBACKED_BINDINGS, VALUE
from autodeploy.graph.spelling import (
    CASTS,
    SYMBOLIC,
    attribute,
    is_number_function,
    is_python_operator,
    overloads,
    per_target,
)

# Ops that are a formula in plain torch. It is run node by node, for formulas have parts in common.
formulas: dict[OpOverload, Callable[..., Any]] = {}
_propagators: WeakKeyDictionary[fx.Graph, _Propagator] = WeakKeyDictionary()


def new_mode() -> FakeTensorMode:
    """A fake mode whose sizes are symbols of their own, never taken for one another because they look alike."""
    # torch's cache of calls costs as much again as a call, and equal calls are not run twice here.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        return FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))


def new_size(mode: FakeTensorMode, name: str, hint: int) -> torch.SymInt:
    """A new size of at least 2 that readers know by `name`; `hint` is the size to tune and to estimate for.

    torch's tracers take 0 and 1 for other programs, in which dimensions broadcast or are empty.
    """
    env, source = mode.shape_env, ConstantSource(name)
    assert env is not None
    size = env.create_symintnode(env.create_symbol(hint, source, DimDynamic.DYNAMIC), hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that the values of `graph` were made under, None where it has no fake tensors."""
    return next((leaf.fake_mode for node in graph.nodes for leaf in tensors(node) if type(leaf) is FakeTensor), None)


def tensors(node: fx.Node) -> list[Tensor]:
    """The recorded tensors of `node`; none where nothing is recorded."""
    value = VALUE.get(node)
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def missing(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that make a value but have none recorded."""
    return [node for node in graph.nodes if not VALUE.on(node) and _has_value(node)]


def _has_value(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(attribute(node), Tensor)
    return node.op == "placeholder" or (node.op != "output" and bool(node.users))


def use_mode(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """From here on values of `graph` are made under `mode`. Whoever calls this gives every node a new value."""
    _propagators[graph] = _Propagator(mode)


def record_values(nodes: Iterable[fx.Node]) -> None:
    """Give new nodes (in graph order) their values; nodes of a graph without values are left without."""
    nodes = list(nodes)
    propagator = _propagator(nodes[0].graph) if nodes else None
    if propagator is None:
        return
    with propagator.running(nodes[0].graph):
        for node in nodes:
            if all(VALUE.on(arg) or not _has_value(arg) for arg in node.all_input_nodes):
                propagator.record(node)


def retype(graph: fx.Graph, stale: Collection[fx.Node]) -> None:
    """Make the values of `stale` again, and of all that reads a value which changed by that.

    An input that is `stale` was given a new value already.
    """
    propagator = _propagator(graph) if stale else None
    if propagator is None:
        return
    if not all(map(_is_plain, graph.nodes)):
        _retype_whole(graph, propagator.mode)
        return
    stale, changed = set(stale), set()
    is_whole = len(stale) == len(graph.nodes)
    with propagator.running(graph):
        for node in graph.nodes:
            if node.op == "output" or (node not in stale and changed.isdisjoint(node.all_input_nodes)):
                continue
            before = VALUE.get(node)
            if node.op != "placeholder":
                propagator.record(node)
            if is_whole:
                continue
            if node.op == "placeholder" or propagator.kind(before) != propagator.kind(node):
                changed.add(node)


def replace_node(node: fx.Node, new: fx.Node) -> list[fx.Node]:
    """Let the users of `node` read `new`; returns those to `retype`, whose input is of another dtype, shape or stride.

    `node` stays, without users.
    """
    users = list(node.users)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    propagator = _propagator(node.graph)
    if propagator is None or propagator.kind(node) == propagator.kind(new):
        return []
    return [user for user in users if user is not new and user.op != "output"]


def _propagator(graph: fx.Graph) -> _Propagator | None:
    """What runs nodes of `graph`; graphs of one mode share it."""
    found = _propagators.get(graph)
    if found is None and (mode := mode_of(graph)) is not None:
        known = (other for other in _propagators.values() if other.mode is mode)
        found = _propagators[graph] = next(known, None) or _Propagator(mode)
    return found


@per_target
def _is_plain(op: str, target: Any) -> bool:
    """Whether a run of a node alone leaves nothing behind: neither another shape of its input nor a changed mode."""
    if op not in ("call_function", "call_method"):
        return True
    if isinstance(target, HigherOrderOperator) or target is getattr or (op == "call_method" and target in CASTS):
        return True
    if is_python_operator(target) or is_number_function(target):
        return True
    known = overloads(op, target)
    return bool(known) and not any(torch.Tag.inplace_view in overload.tags for overload in known)


def _retype_whole(graph: fx.Graph, mode: FakeTensorMode) -> None:
    gm = graph.owning_module
    assert gm is not None
    inputs = [VALUE.of(node) for node in graph.find_nodes(op="placeholder")]
    with symbolic():
        Propagation(gm, mode).propagate_dont_convert_inputs(*inputs)


@contextmanager
def symbolic() -> Iterator[None]:
    """What fake tensors are run under: Python decompositions, for kernels in C++ may ask for a size as a number, which
    would make it that number for good."""
    with enable_python_dispatcher(), torch.no_grad():
        yield


class Propagation(FakeTensorProp):
    """torch's own, that runs a graph under a fake mode and records every value; attributes become fake as well, and
    devices and dtypes are recorded, too."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.device | torch.dtype):
            VALUE.set(n, result)
        return result

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


class _Propagator(Propagation):
    """Runs nodes one at a time on the values of their arguments, equal calls once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__(_EMPTY, mode)
        self.mode = mode
        self._kinds: dict[int, tuple[Any, Any]] = {}  # by id: the tensor, which keeps the id its own, and its kind
        self._numbers: dict[Any, int] = {}
        self._results: dict[Any, tuple[Any, Any]] = {}  # by call: the target, for the same reason, and the value

    @contextmanager
    def running(self, graph: fx.Graph) -> Iterator[None]:
        """While open, nodes of `graph` can be recorded."""
        outer, self.module = self.module, graph.owning_module or _EMPTY
        try:
            with self.mode, symbolic():
                yield
        finally:
            self.module = outer

    def record(self, node: fx.Node) -> None:
        """Make the value of `node`. Raises InvariantError where its op cannot run on fake tensors."""
        key = self._call(node)
        if key in self._results:
            VALUE.set(node, self._results[key][1])
            return
        VALUE.take(node)
        try:
            if isinstance(node.target, OpOverload) and node.target in formulas:
                self._write_out(node)
            else:
                self.run_node(node)
        except Exception as error:
            raise InvariantError(
                f"{node.target} cannot be run on fake tensors: {type(error).__name__}: {error}",
                where=node_location(node),
                fix="a custom op needs torch.library.register_fake",
            ) from error
        if key is not None and VALUE.on(node) and not UNBACKED_BINDINGS.on(node):
            self._results[key] = (node.target, VALUE.of(node))

    def _write_out(self, node: fx.Node) -> None:
        graph = fx.Graph()
        tracer = GraphAppendingTracer(graph)

        def as_input(arg: fx.Node) -> Any:
            copy = graph.placeholder(arg.name)
            VALUE.set(copy, _value_of(arg))
            return Proxy(copy, tracer)

        args, kwargs = map_arg((node.args, node.kwargs), as_input)
        result = formulas[node.target](*args, **kwargs)  # type: ignore[index]
        for each in graph.nodes:
            if each.op != "placeholder":
                self.record(each)
        VALUE.set(node, VALUE.of(result.node))

    def kind(self, value: Any) -> Any:
        """What a value, or that of a node, is, hashable: dtype, device, shape, strides; for a symbol its expression."""
        if type(value) is fx.Node:
            value = _value_of(value)
        if value is None or type(value) in (int, float, bool, str):
            return (type(value), value)
        if isinstance(value, Tensor):
            found = self._kinds.get(id(value))
            if found is None:
                number = self._numbers.setdefault(_describe(value), len(self._numbers))
                found = self._kinds[id(value)] = (value, number)
            return (Tensor, found[1])
        if isinstance(value, list | tuple):
            return tuple([self.kind(item) for item in value])
        if isinstance(value, dict):
            return (dict, *((name, self.kind(item)) for name, item in value.items()))
        if isinstance(value, slice):
            return (slice, self.kind((value.start, value.stop, value.step)))
        if isinstance(value, SYMBOLIC):
            return (type(value), value.node.expr)
        return (type(value), value)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fetched = map_arg((n.args, n.kwargs), _value_of)
        if not _is_plain(n):
            fetched = map_aggregate(fetched, lambda value: snapshot_fake(value) if isinstance(value, Tensor) else value)
        return fetched

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = self.module.get_submodule(str(target))
        if not isinstance(owner, fx.GraphModule) or kwargs:
            return owner(*args, **kwargs)
        inputs = owner.graph.find_nodes(op="placeholder")
        stale = missing(owner.graph)
        for node, value in zip(inputs, args, strict=True):
            if self.kind(node) != self.kind(value):
                VALUE.set(node, value)
                stale.append(node)
        retype(owner.graph, stale)
        return map_arg(owner.graph.output_node().args[0], _value_of)

    def _call(self, node: fx.Node) -> Any:
        """What makes two nodes have one value; None for what has to be run each time."""
        if node.op == "get_attr":
            value = attribute(node)
            kind = _describe(value) if type(value) in (Tensor, torch.nn.Parameter) else None
            return ("get_attr", kind) if isinstance(kind, tuple) else None
        if node.op == "call_module" or isinstance(node.target, HigherOrderOperator) or not _is_plain(node):
            return None
        return (node.target if node.op == "call_method" else id(node.target), self.kind((node.args, node.kwargs)))


_EMPTY = fx.GraphModule(torch.nn.Module(), fx.Graph())


def _value_of(node: fx.Node) -> Any:
    """The recorded value of `node`; of a graph that an attribute holds, itself."""
    return VALUE.of(node) if VALUE.on(node) else attribute(node) if node.op == "get_attr" else None


def _describe(tensor: Tensor) -> Any:
    """All that an op can tell of a fake tensor. Where some of it is not known to us: the object itself."""
    constant = getattr(tensor, "constant", None)
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or constant is not None:
        return id(tensor)
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    numbers = [size.node.expr if type(size) is torch.SymInt else size for size in sizes]
    return (tensor.dtype, tensor.device, *numbers)
