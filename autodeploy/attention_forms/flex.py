"""flex_attention, written out as the products and the softmax that it stands for, so that they can be read like others.

Before:                                             After, in front of it:
    out = flex_attention(q, k, v, score_mod,            scores = matmul(q, transpose(k, -1, -2)) * scale
        (..., mask_mod), scale, ...)                    scores = score_mod(scores, b, h, i, j)
                                                        scores = where(mask_mod(b, h, i, j), scores, -inf)
                                                        out = matmul(softmax(scores), v)

The block lists beside mask_mod say where to look, not what is seen, and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.attention_forms.evaluate import Knowledge, learn
from autodeploy.graph.edit import between, get_attribute, record
from autodeploy.graph.effects import is_pure
from autodeploy.graph.meta import VALUE
from autodeploy.graph.values import record_values

aten = torch.ops.aten
FLEX = torch.ops.higher_order.flex_attention
_FLAT_APPLY = torch.ops.higher_order.flat_apply
_FRESH = (aten.new_zeros.default, aten.zeros.default, aten.new_ones.default, aten.ones.default)
_VMAP = "torch._functorch.predispatch"
_MOD_INDEX = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"


@dataclass(frozen=True)
class WrittenOut:
    """The `nodes` that stand for `output`, the result of the flex_attention `node`, with their `softmax`."""

    node: fx.Node
    output: fx.Node
    softmax: fx.Node
    nodes: tuple[fx.Node, ...]

    def erase(self) -> None:
        """Take the written form away again."""
        erase_unused(self.nodes)

    def erase_flex(self) -> None:
        """Take the flex_attention away, which nothing uses any longer, and the block lists that were made for it."""
        erase_unused([*self.node.users])
        inputs = self.node.all_input_nodes
        self.node.graph.erase_node(self.node)
        erase_unused(inputs)


def erase_unused(nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` that nothing uses, and what was there for them alone, in-place writes to it included."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node._erased or node.users or node.op == "placeholder" or _writes_elsewhere(node):
            continue
        waiting += node.all_input_nodes
        node.graph.erase_node(node)


def erase_idle_lists(gm: fx.GraphModule) -> None:
    """Take away block lists that no flex_attention reads; no dead code elimination knows vmap's functions."""
    ends = [node for node in gm.graph.nodes if getattr(node.target, "__module__", None) == _VMAP or is_pure(node)]
    erase_unused([node for node in ends if node.op == "call_function"])


def _writes_elsewhere(node: fx.Node) -> bool:
    """Whether `node` writes to something that others may see."""
    if not _writes(node):
        return False
    written = node.all_input_nodes[0]
    is_seen = any(user is not node and set(user.users) != {node} for user in written.users)
    return is_seen or written.target not in _FRESH


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def why_not(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """None where the flex_attention `node` can be written out, else why not."""
    arguments: tuple[Any, ...] = node.args
    query, key, value, score_mod, block_mask, scale, *_ = arguments
    if any(user.args[1] != 0 for user in node.users if user.users):
        return "has a log-sum-exp that is used"
    if not isinstance(scale, int | float):
        return "has a scale that is not a number"
    if not all(isinstance(VALUE.of(operand).shape[1], int) for operand in (query, key, value)):
        return "has a number of heads that is not known"
    for mod in (score_mod, block_mask[-1]):
        for inner in get_attribute(gm, str(mod.target)).graph.nodes:
            if inner.target is _FLAT_APPLY and inner.args[2] != _MOD_INDEX:
                return f"has a mod that calls {inner.args[2]}"
    return None


def write_out(gm: fx.GraphModule, node: fx.Node) -> WrittenOut:
    """Put the written form in front of `node`, for which there is no reason `why_not`."""
    arguments: tuple[Any, ...] = node.args
    query, key, value, score_mod, block_mask, scale, _, score_captures, mask_captures = arguments
    before = node.prev
    scores, indices = record(node, _scores, query, key, scale, _group_size(query, key), VALUE.of(query).device)
    scores = _inline(gm, node, score_mod, (scores, *indices, *score_captures))
    seen = _inline(gm, node, block_mask[-1], (*indices, *mask_captures))
    softmax, _ = record(node, _weigh, scores, seen, value, _group_size(query, value))
    output = next(user for user in node.users if user.args[1] == 0)
    return WrittenOut(node, output, softmax, tuple(between(before, node)))


def learn_without_flex(gm: fx.GraphModule) -> Knowledge:
    """What can be told of `gm` when flex_attention and its block lists are gone, whose ops all look like writes."""
    if not gm.graph.find_nodes(op="call_function", target=FLEX):
        return learn(gm)
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, copies))
    copy = fx.GraphModule(gm, graph)
    for node in graph.find_nodes(op="call_function", target=FLEX):
        inputs = node.all_input_nodes
        node.replace_all_uses_with(inputs[0])  # no more known than its result
        graph.erase_node(node)
        erase_unused(inputs)
    learned = learn(copy)
    known, written = ({original for original, node in copies.items() if node in nodes} for nodes in learned)
    return Knowledge(known, written)


def _scores(query: Any, key: Any, scale: float, group_size: int, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """Scores [B, H, S, S], and the indices of batch, head, query and key, each broadcastable to them."""
    if group_size > 1:
        key = aten.repeat_interleave.self_int(key, group_size, 1)
    scores = aten.mul.Tensor(aten.matmul.default(query, aten.transpose.int(key, -1, -2)), scale)
    indices = []
    for dim in range(4):
        index = aten.arange.default(aten.sym_size.int(scores, dim), device=device)
        indices.append(aten.reshape.default(index, [-1 if at == dim else 1 for at in range(4)]))
    return scores, tuple(indices)


def _weigh(scores: Any, seen: Any, value: Any, group_size: int) -> tuple[Any, Any]:
    weights = aten.softmax.int(aten.where.ScalarOther(seen, scores, -math.inf), -1)
    if group_size > 1:
        value = aten.repeat_interleave.self_int(value, group_size, 1)
    return weights, aten.matmul.default(weights, value)


def _group_size(query: fx.Node, key: fx.Node) -> int:
    return VALUE.of(query).shape[1] // VALUE.of(key).shape[1]


def _inline(gm: fx.GraphModule, before: fx.Node, body: Any, arguments: tuple[Any, ...]) -> fx.Node:
    """Copy the graph of a score_mod or mask_mod in front of `before`; it is pointwise, so that it takes tensors too."""
    path = str(body.target)
    inner: fx.GraphModule = get_attribute(gm, path)
    inputs = inner.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(inputs, arguments, strict=True))
    result: Any = None
    previous = before.prev
    with before.graph.inserting_before(before):
        for node in inner.graph.nodes:
            if node.op == "output":
                result = copies[node.all_input_nodes[0]]
            elif node.target is _FLAT_APPLY:
                copies[node] = before.graph.call_function(aten.index.Tensor, _indexing(node, copies))
            elif node.op == "call_function":
                copies[node] = before.graph.node_copy(node, copies.__getitem__)
            elif node.op == "get_attr" and isinstance(get_attribute(inner, str(node.target)), torch.Tensor):
                copies[node] = before.graph.get_attr(f"{path}.{node.target}")
    record_values(between(previous, before))
    return result


def _indexing(node: fx.Node, copies: dict[fx.Node, Any]) -> tuple[Any, list[Any]]:
    """The arguments of the index op that a mod's `tensor[i, j]` was traced as a call of."""
    _, _, _, tensor, *indices = node.args
    assert isinstance(tensor, fx.Node)
    return copies[tensor], [copies[index] for index in indices if isinstance(index, fx.Node)]
