"""Indexers that a model wrote itself: the best of the tokens before each one, by a weighted sum over heads.

Before:                                             After:
    scores = relu(matmul(q, transpose(k)) * s)          chosen = autodeploy.lightning_indexer(q, k, w, scale=s,
    total = matmul(unsqueeze(w, -2), scores)                num_chosen=2048)
    chosen = topk(squeeze(total, -2) + mask, 2048)[1]
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.attention_forms.asked import Masks, Seen, Sizes
from autodeploy.attention_forms.evaluate import Evaluator, Refused
from autodeploy.attention_forms.scores import Term
from autodeploy.graph.edit import record
from autodeploy.graph.meta import VALUE
from autodeploy.graph.values import replace_node
from autodeploy.ops.kinds.lightning_indexer import index_scores

aten = torch.ops.aten
TOPK = aten.topk.default
_SQUEEZES = frozenset({aten.squeeze.dim, aten.squeeze.dims})
_UNSQUEEZES = frozenset({aten.unsqueeze.default})
_TRANSPOSITIONS = frozenset({aten.transpose.int, aten.mT.default})
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default})
_LENGTH, _BATCH = 7, 2


@dataclass(frozen=True)
class Indexer:
    """`positions` are chosen by `query` [B, S, H, D], `key` [B, S, D] and `weights` [B, S, H]."""

    positions: fx.Node
    query: fx.Node
    key: fx.Node
    weights: fx.Node
    scale: float
    num_chosen: int


def is_of_tokens(node: fx.Node) -> bool:
    """Whether `node`, a top-k, chooses among tokens: as many as the batch has, which is no number."""
    value = VALUE.get(node.all_input_nodes[0])
    return isinstance(value, Tensor) and value.dim() == 3 and isinstance(value.shape[-1], torch.SymInt)


def read_indexer(gm: fx.GraphModule, node: fx.Node, masks: Masks, sizes: Sizes) -> Indexer:
    """What the top-k `node` is the end of. Raises Refused."""
    if list(node.args[2:]) not in ([], [-1], [2], [-1, True, True], [2, True, True]):
        raise Refused("chooses tokens other than the best")
    positions = next(iter(node.users))
    if len(node.users) != 1 or positions.target is not operator.getitem or positions.args[1] != 1:
        raise Refused("chooses tokens, and uses their scores")
    total, terms = _without_masks(node.all_input_nodes[0], masks)
    if not terms or masks.read(terms, False) != Seen(True):
        raise Refused("chooses tokens, and not among all up to each one")
    weights, scores = _factors(_back(total, _SQUEEZES), "weighs tokens by something other than a product")
    if scores.target is not aten.relu.default:
        raise Refused("weighs tokens by something other than positive scores")
    product, scale = scores.all_input_nodes[0], 1.0
    if product.target is aten.mul.Tensor and isinstance(product.args[1], int | float):
        product, scale = product.all_input_nodes[0], float(product.args[1])
    query, key = _factors(product, "scores tokens by no product")
    found = Indexer(
        positions=positions,
        query=_back(query, _CASTS),
        key=_back(key, _CASTS | _UNSQUEEZES | _TRANSPOSITIONS),
        weights=_back(weights, _UNSQUEEZES),
        scale=scale,
        num_chosen=_count(node.args[1]),
    )
    _check(gm, found, total, sizes)
    return found


def rewrite(found: Indexer) -> list[fx.Node]:
    """Put the canonical indexer in place; returns the nodes whose values are to be made again."""

    def canonical(query: Any, key: Any, weights: Any) -> Any:
        chosen = torch.ops.autodeploy.lightning_indexer.default(
            query, key, weights, num_chosen=found.num_chosen, scale=found.scale
        )
        return aten.to.dtype(chosen, torch.int64)

    new = record(found.positions, canonical, found.query, found.key, found.weights)
    stale = replace_node(found.positions, new)
    found.positions.graph.erase_node(found.positions)
    return stale


def _without_masks(node: fx.Node, masks: Masks) -> tuple[fx.Node, list[Term]]:
    """The scores [B, S, S] in front of all masks."""
    terms: list[Term] = []
    while True:
        shape = VALUE.of(node).shape
        if node.target is aten.add.Tensor and len(node.all_input_nodes) == 2:
            scores, mask = node.all_input_nodes
            term = Term(mask, "add", shape)
        elif node.target is aten.masked_fill.Scalar:
            scores, mask = node.all_input_nodes
            fill: Any = node.args[2]
            term = Term(mask, "drop", shape, fill=fill)
        else:
            return node, terms
        if not masks.is_mask(term):
            return node, terms
        node = scores
        terms.append(term)


def _factors(node: fx.Node, reason: str) -> tuple[fx.Node, fx.Node]:
    if node.target is not aten.matmul.default:
        raise Refused(reason)
    first, second = node.all_input_nodes
    return first, second


def _back(node: fx.Node, passed: frozenset[Any]) -> fx.Node:
    """Where `node` comes from, through ops that leave values as they are."""
    while node.target in passed:
        node = node.all_input_nodes[0]
    return node


def _count(count: Any) -> int:
    """X of a top-k of X, or of the smaller of X and the number of tokens."""
    if isinstance(count, fx.Node):
        numbers = [arg for arg in count.args if isinstance(arg, int)]
        if count.target is not torch.sym_min or len(numbers) != 1:
            raise Refused("chooses a number of tokens that is not known")
        return numbers[0]
    return count


def _check(gm: fx.GraphModule, found: Indexer, total: fx.Node, sizes: Sizes) -> None:
    """Raise Refused where the canonical scores of random inputs are not those of the graph."""
    inputs = (found.query, found.key, found.weights)
    if [VALUE.of(node).dim() for node in inputs] != [4, 3, 3]:
        raise Refused("chooses tokens by inputs of other shapes than an indexer's")
    at = sizes.at(VALUE.of(found.key).shape[1], _LENGTH, _BATCH)
    generator = torch.Generator().manual_seed(0)
    shape = Evaluator(gm, at).shape
    given = {node: torch.randn(shape(VALUE.of(node)), generator=generator).to(VALUE.of(node).dtype) for node in inputs}
    with torch.no_grad():
        graph = Evaluator(gm, at, given)(total)
        query, key, weights = (given[node] for node in inputs)
        canonical = index_scores(query, key, weights, found.scale)
    if graph.shape != canonical.shape or not torch.allclose(graph.float(), canonical, atol=1e-4, rtol=1e-4):
        raise Refused("weighs tokens by other scores than an indexer's")
