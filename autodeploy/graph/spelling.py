"""The ways in which FX graphs spell an op, and the ATen overloads that each may stand for.

Export and AOTAutograd write ATen overloads; Dynamo and symbolic_trace write torch functions, tensor methods and Python
operators. A torch function or method is judged by the ATen op of its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from autodeploy.graph.meta import EXAMPLE_VALUE, VALUE

# Methods without an ATen op of their name.
CASTS = frozenset(
    ["bfloat16", "bool", "byte", "char", "cpu", "cuda", "double", "float", "half", "int", "long", "short", "type"]
)
_MEASURES = frozenset(
    ["dim", "element_size", "get_device", "is_contiguous", "is_floating_point", "ndimension", "nelement", "numel"]
)
_MEASURES |= {"size", "stride", "storage_offset"}
_ATTRIBUTES = frozenset(["device", "dtype", "is_cuda", "layout", "ndim", "shape"])
VIEW_ATTRIBUTES = frozenset(["H", "T", "data", "imag", "mH", "mT", "real"])
_OPERATORS = frozenset(
    [
        "abs",
        "add",
        "and_",
        "concat",
        "contains",
        "eq",
        "floordiv",
        "ge",
        "getitem",
        "gt",
        "index",
        "inv",
        "invert",
        "le",
        "lshift",
        "lt",
        "matmul",
        "mod",
        "mul",
        "ne",
        "neg",
        "not_",
        "or_",
        "pos",
        "pow",
        "rshift",
        "sub",
        "truediv",
        "truth",
        "xor",
    ]
)
_IN_PLACE_OPERATORS = frozenset(
    [
        "delitem",
        "iadd",
        "iand",
        "iconcat",
        "ifloordiv",
        "ilshift",
        "imatmul",
        "imod",
        "imul",
        "ior",
        "ipow",
        "irshift",
        "isub",
        "itruediv",
        "ixor",
        "setitem",
    ]
)
# Where a function that has the name of an ATen op is that op.
_MODULES = frozenset(
    ["torch", "torch.functional", "torch.nn.functional"]
    + [f"torch._C._{name}" for name in ("fft", "linalg", "nn", "sparse", "special")]
)
_MEASURING_OPS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "sym_is_contiguous")
    if hasattr(torch.ops.aten, name)
)


# What a tracer records of nodes that give no tensors; True is an int.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
NUMBERS = (*SYMBOLIC, int, float)

Fact = TypeVar("Fact")


def per_target(fact: Callable[[str, Any], Fact]) -> Callable[[fx.Node], Fact]:
    """A function of a node's `op` and `target`, computed once for each; targets are told apart by identity.

    The hash of an OpOverload is Python code: a third of the time of a sweep over a graph was spent on it.
    """
    known: dict[tuple[str, Any], tuple[Any, Fact]] = {}

    def of_node(node: fx.Node) -> Fact:
        op, target = node.op, node.target
        key = (op, target if type(target) is str else id(target))
        found = known.get(key)
        if found is None:
            found = known[key] = (target, fact(op, target))  # the reference keeps the id from being used again
        return found[1]

    return of_node


def is_python_operator(target: Any) -> bool:
    """Whether `target` computes a value as an operator of Python does; `is` asks for identity and is none."""
    return _operator_name(target) in _OPERATORS


def is_in_place_operator(target: Any) -> bool:
    """Whether `target` is a Python operator that writes to its first argument where that is a tensor."""
    return _operator_name(target) in _IN_PLACE_OPERATORS


def _operator_name(target: Any) -> str:
    return target.__name__ if getattr(target, "__module__", None) == "_operator" else ""


def is_number_function(target: Any) -> bool:
    """Whether `target` takes and gives nothing but numbers: functions of `math`, torch's symbolic functions."""
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    return module == "math" or (module == "torch" and name.startswith(("sym_", "_sym_")))


@per_target
def is_arithmetic(op: str, target: Any) -> bool:
    """Whether a node makes numbers of numbers: operators, `math`, torch's symbolic functions."""
    if op != "call_function":
        return False
    return is_python_operator(target) or is_number_function(target)


def is_measure(node: fx.Node) -> bool:
    """Whether `node` is a size, a dtype or the like of a tensor: known without reading the tensor's values."""
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return _only_measures(node)


@per_target
def _only_measures(op: str, target: Any) -> bool:
    if op == "call_method":
        return target in _MEASURES
    return isinstance(target, OpOverload) and target.overloadpacket in _MEASURING_OPS


@cache
def overloads(op: str, target: Any) -> tuple[OpOverload, ...]:
    """The overloads that a node with this `op` and `target` may stand for; none where no op is known.

    Overloads with an `out` argument are left out.
    """
    if isinstance(target, OpOverload):
        return (target,)
    if isinstance(target, HigherOrderOperator):
        return ()
    packet = target if isinstance(target, OpOverloadPacket) else None
    if op == "call_method":
        packet = getattr(torch.ops.aten, str(target), None)
    elif packet is None and getattr(target, "__module__", None) in _MODULES:
        packet = getattr(torch.ops.aten, getattr(target, "__name__", ""), None)
    found = [getattr(packet, name) for name in packet.overloads()] if isinstance(packet, OpOverloadPacket) else []
    return tuple(overload for overload in found if not any(arg.is_out for arg in overload._schema.arguments))


def base_name(overload: OpOverload) -> str:
    """The name without namespace and overload: "add" of `aten::add.Tensor`."""
    return overload._schema.name.split("::")[1]


def spelled(node: fx.Node) -> str:
    """The op of `node` as a message names it: "aten.rand.default", "dropout", "clamp_"."""
    if isinstance(node.target, (str, OpOverload, HigherOrderOperator)):
        return str(node.target)
    return getattr(node.target, "__name__", "") or str(node.target)


def attribute(node: fx.Node) -> Any:
    """The parameter, buffer, constant or graph that a get_attr node names; None where its graph has no module."""
    module = node.graph.owning_module
    return operator.attrgetter(str(node.target))(module) if module is not None else None


def recorded_value(node: fx.Node) -> Any:
    """The fake value that a tracer left on `node`, or None."""
    return VALUE.get(node, EXAMPLE_VALUE.get(node))
