"""Attention whose keys and values come of one vector per token, by products that only differ from head to head.

How keys and values were put together is asked, not read: every element of what they were made from gets a number of
its own, views, splits, joins and copies are run on the numbers, and where each one went says what there was.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from autodeploy.attention_forms.asked import Sizes
from autodeploy.attention_forms.evaluate import Evaluator, Refused
from autodeploy.graph.aliasing import sharing, writes
from autodeploy.graph.edit import record
from autodeploy.graph.meta import VALUE
from autodeploy.graph.values import replace_node
from autodeploy.ops.kinds import attention

aten = torch.ops.aten
_MOVES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
        *(aten.unflatten.int, aten.transpose.int, aten.permute.default, aten.movedim.int, aten.movedim.intlist),
        *(aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default),
        *(aten.chunk.default, aten.unbind.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.cat.default, aten.clone.default, aten.contiguous.default, aten.alias.default),
        *(aten.slice_scatter.default, aten.copy_.default, aten.copy.default),
    }
)
_REPEATS = frozenset({aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int})
_FRESH = frozenset({aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default})
_BATCH, _TOKENS = 2, 3  # the sizes at which is asked


@dataclass(frozen=True)
class _Part:
    """Columns of a tensor that one `source` gave. It has batch in dimension `dims[0]` and tokens in `dims[1]`.

    `columns` [H, D] says which element of the others, flattened, went to each head's column; `size` is how many it has.
    """

    source: fx.Node
    dims: tuple[int, int]
    columns: Tensor
    size: int

    @property
    def differs(self) -> bool:
        """Whether heads have columns of their own."""
        return bool((self.columns != self.columns[0]).any())


@dataclass(frozen=True)
class Latent:
    """The attention `node`, whose keys have an `own` part of each head and a `shared` one; `region` made keys and
    values of their sources.
    """

    node: fx.Node
    own: _Part
    shared: _Part
    values: _Part
    is_shared_first: bool
    region: tuple[fx.Node, ...]


def find_latent(gm: fx.GraphModule, node: fx.Node) -> Latent | None:
    """The canonical attention `node` in parts; None where its keys and values are no products of one vector.

    Raises Refused for one that came near.
    """
    query, key, value, _, bias, alibi_slopes, _ = attention.KIND.tensors(node)
    region = _region(node, (key, value))
    sources = [source for source in _sources(region) if isinstance(VALUE.get(source), Tensor)]
    if not any(source.target is aten.linear.default for source in sources) or key not in region or value not in region:
        return None
    labels = _labels(gm, region, sources, (key, value))
    keys, values = _parts(labels, key), _parts(labels, value)
    if len(keys) != 2 or len(values) != 1 or keys[0].differs == keys[1].differs:
        return None
    own, shared = keys if keys[0].differs else reversed(keys)
    if not _is_product(own) or not _is_product(values[0]) or own.source.args[0] is not values[0].source.args[0]:
        return None
    found = Latent(node, own, shared, values[0], keys[0] is shared, tuple(region))
    if bias is not None or alibi_slopes is not None or node.kwargs.get("softcap"):
        raise Refused("has a latent, and a bias, slopes or a soft cap, which no latent attention has")
    if VALUE.of(query).shape[1] != VALUE.of(key).shape[1]:
        raise Refused("has a latent, and fewer heads of keys than of queries")
    cached, expanded = _dims(found)
    if cached >= expanded:
        raise Refused(f"has a latent of {cached} elements, no fewer than the {expanded} of its keys and values")
    _check(found)
    return found


def rewrite(found: Latent) -> list[fx.Node]:
    """Put the canonical latent attention in place; returns the nodes whose values are to be made again."""
    node = found.node
    asked = {name: arg for name, arg in node.kwargs.items() if name in ("scale", "causal", "span")}
    own_dim, shared_dim = found.own.columns.shape[1], found.shared.columns.shape[1]
    first_own, first_shared = (shared_dim, 0) if found.is_shared_first else (0, own_dim)
    first = int(found.shared.columns[0, 0])
    ndims = [VALUE.of(part.source).dim() for part in (found.own, found.shared)]

    def canonical(query: Any, latent: Any, shared_key: Any, key_up: Any, value_up: Any, *more: Any) -> Any:
        return torch.ops.autodeploy.latent_attention.default(
            aten.slice.Tensor(query, -1, first_own, first_own + own_dim),
            aten.slice.Tensor(query, -1, first_shared, first_shared + shared_dim),
            _tokens_first(latent, found.own, ndims[0]),
            aten.slice.Tensor(_tokens_first(shared_key, found.shared, ndims[1]), -1, first, first + shared_dim),
            _per_head(key_up, found.own),
            _per_head(value_up, found.values),
            None,
            *more,
            **asked,
        )

    weights = (part.source.args[1] for part in (found.own, found.values))
    query, _, _, sinks, *_, chosen = attention.KIND.tensors(node)
    new = record(node, canonical, query, found.own.source.args[0], found.shared.source, *weights, chosen, sinks)
    stale = replace_node(node, new)
    node.graph.erase_node(node)
    _erase_copies(found.region)
    return stale


def _region(node: fx.Node, tensors: tuple[fx.Node, ...]) -> list[fx.Node]:
    """What put `tensors` together in front of `node` and computes nothing, in order."""
    region: set[fx.Node] = set()
    waiting = list(tensors)
    while waiting:
        current = waiting.pop()
        if current in region or current.target not in (*_MOVES, *_REPEATS, *_FRESH, operator.getitem):
            continue
        region.add(current)
        # What is repeated for all heads is shared as it is, however it was made.
        waiting += [] if current.target in _REPEATS else current.all_input_nodes
        if current.target in _FRESH:
            waiting += _copies_to(current, node)
    return sorted(region)


def _copies_to(fresh: fx.Node, node: fx.Node) -> list[fx.Node]:
    """What fills the new memory of `fresh`. Raises Refused where that is no copy, or comes after `node`."""
    family = sharing([fresh])
    found = [user for member in family for user in member.users if not family.isdisjoint(writes(user))]
    if any(user.target is not aten.copy_.default or user > node for user in found):
        raise Refused("reads memory that is written to in a way not known")
    return found


def _sources(region: list[fx.Node]) -> list[fx.Node]:
    """What `region` reads and does not make, each once."""
    found = [arg for node in region if node.target not in _FRESH for arg in node.all_input_nodes]
    return [source for source in dict.fromkeys(found) if source not in region]


class _Labels(NamedTuple):
    """Numbers of all elements of `sources`, from one to the next, and which of them are where in `tensors`."""

    sources: dict[fx.Node, Tensor]
    tensors: dict[fx.Node, Tensor]


def _labels(gm: fx.GraphModule, region: list[fx.Node], sources: list[fx.Node], wanted: tuple[fx.Node, ...]) -> _Labels:
    at = Sizes(gm).at(VALUE.of(wanted[0]).shape[2], _TOKENS, _BATCH)
    shape = Evaluator(gm, at).shape
    found = _Labels({}, {})
    end = 0
    for source in sources:
        sizes = shape(VALUE.of(source))
        found.sources[source] = torch.arange(end, end + math.prod(sizes)).view(sizes)
        end += math.prod(sizes)
    blank = {node: torch.full(shape(VALUE.of(node)), -1) for node in region if node.target in _FRESH}
    evaluate = Evaluator(gm, at, found.sources | blank)
    # In the order of the graph, as copies are made one after another.
    values = {node: evaluate(node) for node in region}
    found.tensors.update({node: values[node] for node in wanted})
    return found


def _parts(labels: _Labels, tensor: fx.Node) -> list[_Part]:
    """What the columns of `tensor` [B, H, S, D] were made of, in order; nothing where that is no list of parts."""
    labels_BHSD = labels.tensors[tensor]
    if labels_BHSD.shape[0] != _BATCH or labels_BHSD.shape[2] != _TOKENS or labels_BHSD.min() < 0:
        return []
    ends = torch.tensor([int(source.max()) + 1 for source in labels.sources.values()])
    index_BHSD = torch.bucketize(labels_BHSD.contiguous(), ends, right=True)
    index_D = index_BHSD[0, 0, 0]
    if (index_BHSD != index_D).any():
        return []
    found, first = [], 0
    for index, count in zip(
        *(each.tolist() for each in torch.unique_consecutive(index_D, return_counts=True)), strict=True
    ):
        source = list(labels.sources)[index]
        part = _part(source, labels.sources[source], labels_BHSD[..., first : first + count])
        if part is None:
            return []
        found.append(part)
        first += count
    return found


def _part(source: fx.Node, numbers: Tensor, labels_BHSD: Tensor) -> _Part | None:
    """None where the columns do not all read the source at their own token."""
    steps = [int(labels_BHSD[at] - labels_BHSD[0, 0, 0, 0]) for at in ((1, 0, 0, 0), (0, 0, 1, 0))]
    layout = list(zip(numbers.stride(), numbers.shape, strict=True))
    if not all(each in layout for each in zip(steps, (_BATCH, _TOKENS), strict=True)):
        return None
    batch, tokens = (layout.index(each) for each in zip(steps, (_BATCH, _TOKENS), strict=True))
    if batch == tokens or numbers.dim() < 3:
        return None
    numbers_BSX = numbers.movedim((batch, tokens), (0, 1)).flatten(2)
    first = int(numbers.flatten()[0])
    column_of = torch.full((numbers.numel(),), 0)
    column_of[numbers_BSX[0, 0] - first] = torch.arange(numbers_BSX.shape[2])
    columns_HD = column_of[labels_BHSD[0, :, 0] - first]
    if not torch.equal(numbers_BSX[:, :, columns_HD], labels_BHSD.transpose(1, 2)):
        return None
    return _Part(source, (batch, tokens), columns_HD, numbers_BSX.shape[2])


def _is_product(part: _Part) -> bool:
    """Whether each head has columns of its own of a linear layer."""
    node = part.source
    return part.differs and node.target is aten.linear.default and len(node.args) < 3


def _dims(found: Latent) -> tuple[int, int]:
    """How many elements are cached for a token, of its latent and of all keys and values."""
    latent = int(VALUE.of(found.own.source.all_input_nodes[1]).shape[1])
    (num_heads, own), (_, shared), (_, value) = (part.columns.shape for part in (found.own, found.shared, found.values))
    return latent + shared, num_heads * (own + shared + value)


def _check(found: Latent) -> None:
    """Raise Refused where columns do not follow one another, head by head."""
    for part in (found.own, found.values, found.shared):
        num_heads, count = part.columns.shape
        stride = part.size // num_heads if part.differs else 0
        head_H1, column_D = torch.arange(num_heads)[:, None] * stride, torch.arange(count)
        if not torch.equal(part.columns, part.columns[0, 0] + head_H1 + column_D) or stride * num_heads > part.size:
            raise Refused("has a latent, and its products in an order of their own")
        if part.differs and part.size % num_heads:
            raise Refused("has a latent, and products that are not divided evenly among heads")


def _tokens_first(tensor: Any, part: _Part, ndim: int) -> Any:
    """[B, S, X] of a tensor, or a proxy, with batch and tokens where `part` has them."""
    order = [*part.dims, *(dim for dim in range(ndim) if dim not in part.dims)]
    if order != sorted(order):
        tensor = aten.permute.default(tensor, order)
    return aten.flatten.using_ints(tensor, 2) if ndim > 3 else tensor


def _per_head(weight: Any, part: _Part) -> Any:
    """[H, D, R]: each head's rows of a weight."""
    num_heads, count = part.columns.shape
    first = int(part.columns[0, 0])
    return aten.slice.Tensor(
        aten.unflatten.int(weight, 0, [num_heads, part.size // num_heads]), 1, first, first + count
    )


def _erase_copies(region: tuple[fx.Node, ...]) -> None:
    """Take away memory of `region` that nobody reads any more, with all that is written to it."""
    for fresh in [node for node in region if node.target in _FRESH]:
        family = sharing([fresh])
        if family.issuperset(user for member in family for user in member.users):
            for member in sorted(family, reverse=True):
                fresh.graph.erase_node(member)
