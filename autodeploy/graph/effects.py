"""Whether a node can be computed once instead of twice, or earlier, without anybody noticing."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from autodeploy.graph.meta import UNBACKED_BINDINGS
from autodeploy.graph.spelling import (
    CASTS,
    VIEW_ATTRIBUTES,
    attribute,
    base_name,
    is_in_place_operator,
    is_measure,
    is_number_function,
    is_python_operator,
    overloads,
    per_target,
    recorded_value,
)

RANDOM = "draws random numbers"
EFFECTS = "has effects beside its result"
WRITES = "writes to its arguments"
UNKNOWN = "is not known to be pure"
HOST = "reads a value back to the host"
UNBACKED = "has a size that is known only when it runs"

# Higher-order ops that do nothing but run the graphs they are given.
_PURE_HIGHER_ORDER = frozenset(
    getattr(torch.ops.higher_order, name)
    for name in (
        "associative_scan",
        "auto_functionalized",
        "auto_functionalized_v2",
        "cond",
        "flex_attention",
        "invoke_subgraph",
        "map_impl",
        "out_dtype",
        "scan",
        "while_loop",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    )
    if hasattr(torch.ops.higher_order, name)
)
HOST_READS = frozenset(["item", "numpy", "tolist"])
# In training these write to their running statistics, though the schema does not say so.
KEEPS_STATISTICS = frozenset(
    ["batch_norm", "cudnn_batch_norm", "instance_norm", "miopen_batch_norm", "native_batch_norm"]
)
# Python functions of torch that only call the op of their name; others may draw numbers or write beside it.
_PLAIN_FUNCTIONS = frozenset(
    [
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "block_diag",
        "broadcast_tensors",
        "cartesian_prod",
        "einsum",
        "embedding",
        "log_softmax",
        "meshgrid",
        "norm",
        "pad",
        "relu",
        "sigmoid",
        "silu",
        "softmax",
        "split",
        "tanh",
        "tensordot",
    ]
)
_OLD_METHODS = frozenset(["resize", "resize_as"])  # Python, and not the ops of their names
# Unknown functions of no tensor that leave what other nodes compute as it is.
_LOCAL = frozenset(["_set_grad_enabled", "lazy_load_decompositions", "_enter_inference_mode", "_exit_inference_mode"])
_AUTOCAST = {"_enter_autocast": 1, "_exit_autocast": -1}


def is_pure(node: fx.Node) -> bool:
    """Whether computing `node` once instead of twice, or earlier, cannot be noticed."""
    return impurity(node) is None


def impurity(node: fx.Node) -> str | None:
    """Why computing `node` once instead of twice, or earlier, could be noticed; None where it could not."""
    if node.op == "get_attr" or is_measure(node):
        return None
    if isinstance(node.target, HigherOrderOperator):
        return _higher_order_impurity(node)
    if node.target is getattr:
        return None if node.args[1] in VIEW_ATTRIBUTES else UNKNOWN
    reason, may_be_unbacked = _target_impurity(node)
    if reason is None and ("out" in node.kwargs or is_asked_to_write(node)):
        return WRITES
    return UNBACKED if reason is None and may_be_unbacked and _is_unbacked(node) else reason


def is_needed(node: fx.Node) -> bool:
    """Whether dropping `node` could be noticed even where nobody reads it; for `Graph.eliminate_dead_code`."""
    return node.op in ("placeholder", "output") or impurity(node) not in (None, UNBACKED, HOST)


@per_target
def autocast_change(op: str, target: Any) -> int:
    """1 where a node opens a region in which ops compute in another dtype, -1 where it closes one, else 0."""
    return _AUTOCAST.get(getattr(target, "__name__", ""), 0) if op == "call_function" else 0


def changes_surroundings(node: fx.Node) -> bool:
    """Whether `node` may change how later nodes compute: a default dtype, a mode, a seed."""
    if node._input_nodes or node.op != "call_function" or autocast_change(node):
        return False
    return impurity(node) == UNKNOWN and getattr(node.target, "__name__", "") not in _LOCAL


def is_asked_to_write(node: fx.Node) -> bool:
    """Whether a torch function is asked by an argument to write to its inputs: `inplace`, or `max_norm` of a table."""
    for position, name in _writing_parameters(node):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        # A norm of 0 writes zeros; only a flag may be falsy to say no.
        if value is not None and (name == "max_norm" or value):
            return True
    return False


@per_target
def _writing_parameters(op: str, target: Any) -> list[tuple[int, str]]:
    if not inspect.isfunction(target):
        return []
    names = enumerate(inspect.signature(target).parameters)
    return [(position, name) for position, name in names if name in ("inplace", "max_norm")]


@per_target
def _target_impurity(op: str, target: Any) -> tuple[str | None, bool]:
    """Why no node with this target is pure, or None; and whether the size of its result may depend on data."""
    if op == "call_method" and target in HOST_READS:
        return HOST, False
    if op == "call_method" and target in CASTS:
        return None, False
    if is_in_place_operator(target):
        return WRITES, False
    if is_python_operator(target):
        return None, True  # `x[mask]` has an unbacked size
    if is_number_function(target):
        return None, False
    known = overloads(op, target)
    if not known or (op == "call_method" and target in _OLD_METHODS):
        return UNKNOWN, False
    reasons = [reason for overload in known if (reason := _overload_impurity(overload))]
    if not reasons and inspect.isfunction(target) and target.__name__ not in _PLAIN_FUNCTIONS:
        reasons = [UNKNOWN]
    return reasons[0] if reasons else None, any(_has_dynamic_size(overload) for overload in known)


def _overload_impurity(overload: OpOverload) -> str | None:
    if torch.Tag.nondeterministic_seeded in overload.tags:
        return RANDOM
    if overload._schema.is_mutable or base_name(overload) in KEEPS_STATISTICS:
        return WRITES
    if torch.Tag.data_dependent_output in overload.tags:
        return HOST
    if not overload._schema.returns:
        return EFFECTS
    # FX knows which ops have effects, but only of nodes.
    return EFFECTS if fx.Graph().call_function(overload).is_impure() else None


def _has_dynamic_size(overload: OpOverload) -> bool:
    return torch.Tag.dynamic_output_shape in overload.tags or overload.namespace not in ("aten", "prims")


def _is_unbacked(node: fx.Node) -> bool:
    """Whether tracing made up a symbol for the size of this node's result."""
    if UNBACKED_BINDINGS.get(node):
        return True
    value = recorded_value(node)
    return value is not None and bool(free_unbacked_symbols(value))


def _higher_order_impurity(node: fx.Node) -> str | None:
    if node.target not in _PURE_HIGHER_ORDER:
        return UNKNOWN
    if _is_unbacked(node):
        return UNBACKED
    if node.args and isinstance(wrapped := node.args[0], OpOverload):
        reason = _overload_impurity(wrapped)
        return None if reason == WRITES else reason  # auto_functionalized gives it copies to write to
    bodies = [attribute(arg) for arg in node.all_input_nodes if arg.op == "get_attr"]
    bodies = [body for body in bodies if isinstance(body, fx.GraphModule)]
    reasons = (body_impurity(body) for body in bodies)
    return next((reason for reason in reasons if reason), None) if bodies else UNKNOWN


def body_impurity(body: fx.GraphModule) -> str | None:
    """Why running the graph of `body` is not pure, or None."""
    inner = [node for node in body.graph.nodes if node.op not in ("placeholder", "output")]
    return next((reason for node in inner if (reason := impurity(node))), None)
