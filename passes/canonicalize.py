"""Drop what an export leaves behind and no computation needs: checks, casts and views to the same, wrapped regions.

Before:                                             After:
    _assert_tensor_metadata(x, dtype=float32)           y = mul(x, 2)
    x1 = to.dtype(x, float32)                           return linear(y, w)
    y1 = wrap_with_set_grad_enabled(False, body, x1)
    y = transpose(transpose(y1[0], 1, 2), 1, 2)
    return linear(slice(y, 0, 0, 9223372036854775807), w)

Each rule is a `match`, a `check` that says why a match must stay, and a `rewrite`. Values and, as far as an in-place op
could tell, storage sharing stay the same bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from autodeploy.graph import get_attribute, mutated, near_miss

aten = torch.ops.aten

_CHECKS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
# These give back their input, or a view of it, when the result has the input's dtype, shape and strides.
_SAME = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten.type_as.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.dropout.default,
        aten.view.default,
        aten.reshape.default,
        aten.expand.default,
        aten.slice.Tensor,
    }
)
# These always make a new tensor, equal to the input when it has the input's dtype, shape and strides.
_COPIES = frozenset({aten.clone.default, aten._to_copy.default})
_PERMUTATIONS = frozenset({aten.transpose.int, aten.permute.default, aten.t.default})
# Position of the wrapped graph among the arguments of a higher-order op, and of its first operand.
_REGIONS = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}


@dataclass(frozen=True)
class Canonicalize:
    """Leave only nodes that compute something; `apply` returns how many nodes went away."""

    name: str = "canonicalize"

    def apply(self, gm: fx.GraphModule) -> int:
        before = _num_nodes(gm)
        for rule in _RULES:
            _run(rule, gm)
        gm.graph.eliminate_dead_code()
        return before - _num_nodes(gm)


@dataclass(frozen=True)
class _Rule:
    """`match` says whether a node is of the kind, `check` why a match must stay, `rewrite` takes it away."""

    match: Callable[[fx.Node], bool]
    check: Callable[[fx.GraphModule, fx.Node], str | None]
    rewrite: Callable[[fx.GraphModule, fx.Node], None]


def _run(rule: _Rule, gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if not rule.match(node):
            continue
        reason = rule.check(gm, node)
        if reason is None:
            rule.rewrite(gm, node)
        else:
            near_miss(gm, node, reason)


def _is_region(node: fx.Node) -> bool:
    return node.target in _REGIONS


def _why_not_inline(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2]:
        return "autocast changes dtypes inside the region"
    return None


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    """Put the nodes of the wrapped graph, itself without inner regions, in place of the call."""
    body_node, *operands = node.args[_REGIONS[node.target] :]
    assert isinstance(body_node, fx.Node)
    path = str(body_node.target)
    body = get_attribute(gm, path)
    _run(_INLINE_REGIONS, body)
    copies = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with gm.graph.inserting_before(node):
        outputs = gm.graph.graph_copy(body.graph, copies)
    for original, copy in copies.items():
        if original.op in ("get_attr", "call_module"):
            copy.target = f"{path}.{original.target}"
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _is_check(node: fx.Node) -> bool:
    return node.target in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn")


def _erase(gm: fx.GraphModule, node: fx.Node) -> None:
    gm.graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    return node.target in _SAME and _gives_same(node)


def _why_not_identity(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if node.kwargs.get("copy") or (node.target is not aten.dropout.default and True in node.args[2:]):
        return "asks for a copy"
    if node.target is aten.dropout.default and node.args[1] and node.args[2]:
        return f"drops values with probability {node.args[1]}; call model.eval() before tracing"
    return None
