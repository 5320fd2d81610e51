"""A softmax as an op of its own, or written out: exponentials over their sum.

weights = exp(scores - amax(scores, -1, True))        weights = softmax(scores, -1)
weights = weights / sum(weights, -1, True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.scores import is_cast
from autodeploy.graph.along import arguments_of

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_QUOTIENTS = (aten.div.Tensor, aten.div_.Tensor, aten.mul.Tensor)
_MAX_DEPTH = 4


def is_softmax(node: fx.Node) -> bool:
    """Whether `node` is one, or a quotient of exponentials, which may be one."""
    return node.target in SOFTMAXES or (node.target in _QUOTIENTS and _exponential(node.args[0]) is not None)


def softmax_of(node: fx.Node) -> tuple[fx.Node, int]:
    """What the softmax `node` is taken of, and along which dimension. Raises Refused for a quotient that is none."""
    if node.target in SOFTMAXES:
        return node.all_input_nodes[0], node.args[1]  # type: ignore[return-value]
    exponential, divisor = _exponential(node.args[0]), _skip_casts(node.args[1])
    assert exponential is not None
    if node.target is aten.mul.Tensor:
        divisor = _skip_casts(divisor.args[0]) if divisor and divisor.target is aten.reciprocal.default else None
    dim = _summed(divisor, exponential) if divisor else None
    if dim is None:
        raise Refused("divides exponentials of its scores by something other than their sum")
    return exponential.all_input_nodes[0], dim


def _summed(node: fx.Node, exponential: fx.Node) -> int | None:
    """The dimension that `node` sums the `exponential` over; None where it does something else."""
    if node.target is not aten.sum.dim_IntList:
        return None
    arguments = arguments_of(node)
    summed, dims = _exponential(arguments["self"]), arguments["dim"]
    is_whole = summed is not None and _is_same(summed, exponential) and arguments["keepdim"]
    return dims[0] if is_whole and dims and len(dims) == 1 else None


def _exponential(value: Any) -> fx.Node | None:
    node = _skip_casts(value)
    return node if node is not None and node.target in (aten.exp.default, aten.exp_.default) else None


def _skip_casts(value: Any) -> fx.Node | None:
    while isinstance(value, fx.Node) and is_cast(value):
        value = value.all_input_nodes[0]
    return value if isinstance(value, fx.Node) else None


def _is_same(one: Any, other: Any, depth: int = 0) -> bool:
    """Whether two nodes compute the same, near by."""
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or one is other:
        return one is other or (not isinstance(one, fx.Node) and one == other)
    if one.target != other.target or one.kwargs != other.kwargs or depth > _MAX_DEPTH or one.op != "call_function":
        return False
    pairs = zip(one.args, other.args, strict=False)
    return len(one.args) == len(other.args) and all(_is_same(*pair, depth + 1) for pair in pairs)
