"""What an export leaves behind and no computation needs: checks, casts and views to the same, wrapped regions.

Each rule is a `match`, a `check` that says why a match must stay, and a `rewrite`. Values and, as far as an in-place op
could tell, storage sharing stay the same bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from autodeploy.graph.aliasing import mutated, returned
from autodeploy.graph.edit import get_attribute, near_miss
from autodeploy.graph.effects import is_needed
from autodeploy.graph.meta import VALUE

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
        aten.detach_.default,
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
# Position of the wrapped graph among the arguments of a higher-order op; its operands follow.
_REGIONS: dict[Any, int] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}


def canonicalize(gm: fx.GraphModule) -> int:
    """Leave only nodes that compute something; returns how many went away."""
    before = _num_nodes(gm)
    for rule in _RULES:
        _run(rule, gm)
    gm.graph.eliminate_dead_code(is_needed)
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
    path, operands = _body(node), node.args[_REGIONS[node.target] + 1 :]
    body = get_attribute(gm, path)
    _run(_INLINE_REGIONS, body)
    copies: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with gm.graph.inserting_before(node):
        outputs: Any = gm.graph.graph_copy(body.graph, copies)
    for original, copy in copies.items():
        if original.op in ("get_attr", "call_module"):
            copy.target = f"{path}.{original.target}"
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _body(node: fx.Node) -> str:
    """Path of the graph that a region wraps."""
    body = node.args[_REGIONS[node.target]]
    assert isinstance(body, fx.Node)
    return str(body.target)


def _is_check(node: fx.Node) -> bool:
    return node.target in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn")


def _erase(gm: fx.GraphModule, node: fx.Node) -> None:
    gm.graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    return node.target in _SAME and _gives_same(node)


def _why_not_identity(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if _argument(node, "copy"):
        return "asks for a copy"
    if _argument(node, "p") and _argument(node, "train"):
        return "drops values at random; call model.eval() before tracing"
    return None


def _is_copy(node: fx.Node) -> bool:
    return node.target in _COPIES and _gives_same(node)


def _why_not_copy(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if node in returned(gm.graph):
        return "is returned to a caller who may write to it"
    return (
        "is a copy of which one side is written to"
        if {node, *node.all_input_nodes} & mutated(gm.graph).values
        else None
    )


def _forward_input(gm: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    gm.graph.erase_node(node)


def _undoes_permutation(node: fx.Node) -> bool:
    source = node.all_input_nodes[0] if node.target in _PERMUTATIONS else None
    if source is None or source.target not in _PERMUTATIONS or not VALUE.on(source):
        return False
    inner, outer = _permutation(source), _permutation(node)
    return [inner[dim] for dim in outer] == list(range(len(inner)))


def _skip_two(gm: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0].all_input_nodes[0])
    gm.graph.erase_node(node)


def _always(gm: fx.GraphModule, node: fx.Node) -> str | None:
    return None


def _gives_same(node: fx.Node) -> bool:
    before, after = VALUE.get(node.all_input_nodes[0]), VALUE.get(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if (before.dtype, before.device, before.layout) != (after.dtype, after.device, after.layout):
        return False
    same = sym_eq((*before.shape, *before.stride()), (*after.shape, *after.stride()))
    return statically_known_true(same)


def _permutation(node: fx.Node) -> list[int]:
    """The input dimension that each output dimension of a transpose or permute is."""
    order = list(range(VALUE.of(node.all_input_nodes[0]).ndim))
    if node.target is aten.permute.default:
        return [order[dim] for dim in _argument(node, "dims")]
    first, second = (_argument(node, "dim0"), _argument(node, "dim1")) if node.target is aten.transpose.int else (0, -1)
    order[first], order[second] = order[second], order[first]
    return order


def _argument(node: fx.Node, name: str) -> Any:
    """The value of an op's argument however it was passed, or None where the op has no such argument."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            given = node.args[position] if position < len(node.args) else argument.default_value
            return node.kwargs.get(name, given)
    return None


def _num_nodes(gm: fx.GraphModule) -> int:
    """Nodes of `gm` and of the regions it calls."""
    bodies = [get_attribute(gm, _body(node)) for node in gm.graph.nodes if _is_region(node)]
    return len(gm.graph.nodes) + sum(_num_nodes(body) for body in bodies)


_INLINE_REGIONS = _Rule(_is_region, _why_not_inline, _inline)
_RULES = (
    _INLINE_REGIONS,
    _Rule(_is_check, _always, _erase),
    _Rule(_is_identity, _why_not_identity, _forward_input),
    _Rule(_is_copy, _why_not_copy, _forward_input),
    _Rule(_undoes_permutation, _always, _skip_two),
)
