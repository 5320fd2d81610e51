"""Finds the attention around a softmax or a scaled_dot_product_attention."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autodeploy.attention_forms.asked import Masks, Seen, Sizes
from autodeploy.attention_forms.evaluate import Knowledge, Refused, cone, constants
from autodeploy.attention_forms.found import Attention
from autodeploy.attention_forms.heads import Operand, num_heads, peel
from autodeploy.attention_forms.in_place import is_overtaken
from autodeploy.attention_forms.linear import Alibi, read_alibi
from autodeploy.attention_forms.products import EINSUM, PRODUCTS, Product, as_weighed, factors_of, standard_dims
from autodeploy.attention_forms.scores import HIDDEN, ScoreReader, Scores, Term, drops_nothing, is_cast, keeps_rows
from autodeploy.attention_forms.softmaxes import SOFTMAXES, softmax_of
from autodeploy.attention_forms.unfolder import arguments_of
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
# What dispatch makes of it: several results, the first of which is the attention.
_FUSED = {
    aten._scaled_dot_product_attention_math.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}
_FARTHER = 4  # times what a bias adds at most is what a mask must, so that it hides in any case
_PASSED = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)


class Matcher:
    """Matches in one graph, of which something is known."""

    def __init__(self, gm: fx.GraphModule, knowledge: Knowledge) -> None:
        self._known, self._written = knowledge
        self._reader = ScoreReader(gm, self._known)
        self.sizes = Sizes(gm)
        self._masks = Masks(gm, self._known, self.sizes)
        self._alibi: dict[Any, Alibi | None] = {}

    def match(self, node: fx.Node, *, hides_rows: bool = False) -> Attention | None:
        """The attention that `node` is the heart of; None where it is not one. Raises Refused with the reason.

        `hides_rows`: a query that sees nothing gives zeros, as with SDPA, and not NaN or the mean of all values.
        """
        return self._sdpa(node) if is_sdpa(node) else self._softmax(node, hides_rows)

    def _softmax(self, node: fx.Node, hides_rows: bool) -> Attention | None:
        weighed = _weighed(node)
        if weighed is None:
            return None
        ndim = VALUE.of(node).dim()
        logits, dim = softmax_of(node)
        scores = self._reader.read(logits) if ndim > 2 else None
        if scores is None:
            raise Refused("weighs values by something other than queries times keys")
        if dim not in (-1, ndim - 1):
            raise Refused("has a softmax over another dimension than the keys")
        if weighed.is_cut != (scores.sinks is not None):
            raise Refused("drops some of its weights")
        _check_used_once(node, weighed.output)
        form = "flex_attention" if hides_rows else "softmax" if node.target in SOFTMAXES else "exp over sum"
        scores = replace(scores, words=(form, *scores.words))
        return self._attention(weighed.output, scores, weighed.product, hides_rows=hides_rows)

    def _sdpa(self, node: fx.Node) -> Attention:
        call = node if node.target is SDPA else node.all_input_nodes[0]
        arguments = arguments_of(call)
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        mask = arguments.get("attn_mask", arguments.get("attn_bias"))
        if any(result is not node and result.users for result in call.users if call is not node):
            raise Refused("has weights, or their sum, that are used elsewhere too")
        if arguments["dropout_p"]:
            raise Refused("has dropout; call model.eval() before tracing")
        shape = VALUE.of(query).shape
        scale = arguments["scale"]
        scale = shape[-1] ** -0.5 if scale is None else scale
        if not isinstance(scale, int | float):
            raise Refused("has a scale that is not a number")
        if len(shape) not in (3, 4):
            raise Refused(f"has queries of {len(shape)} dimensions")
        product = Product(None, value, standard_dims(node), standard_dims(value), standard_dims(node))
        dims = standard_dims(query), standard_dims(key)
        scores = Scores(query, key, *dims, scale, causal=bool(arguments["is_causal"]), words=("sdpa",))
        if scores.causal:
            scores = replace(scores, words=("sdpa", "is_causal"))
        if mask is not None:
            role = "keep" if VALUE.of(mask).dtype is torch.bool else "add"
            scores_shape = torch.Size([*shape[:-1], VALUE.of(key).shape[-2]])
            scores = scores.plus(Term(mask, role, scores_shape), "bool mask" if role == "keep" else "float mask")
        return self._attention(node, scores, product, hides_rows=True)

    def _attention(self, output: fx.Node, scores: Scores, product: Product, *, hides_rows: bool) -> Attention:
        pairs = ((scores.query, scores.query_dims), (scores.key, scores.key_dims), (product.right, product.right_dims))
        operands = [Operand(*pair) for pair in pairs]
        _check_recorded(operands)
        _check_lengths(operands)
        query, key, value_operand = self._peel(operands)
        heads = num_heads(query, _heads_of(key, value_operand, scores, product, output))
        kv_heads = num_heads(key, heads)
        if num_heads(value_operand, kv_heads) != kv_heads or heads % kv_heads:
            raise Refused(f"has {heads} query heads on {kv_heads} key heads and another number of value heads")
        seen, bias, slopes = self._read_terms(scores, hides_rows, heads)
        words = [*scores.words, *_describe(seen, bias), *(["ALiBi"] if slopes is not None else [])]
        words += ["grouped heads"] if kv_heads < heads else []
        found = Attention(
            output=output,
            output_dims=product.dims,
            query=query,
            key=key,
            value=value_operand,
            num_heads=heads,
            num_kv_heads=kv_heads,
            scale=scores.scale * query.scale * key.scale * (scores.softcap or 1.0),
            softcap=scores.softcap,
            sinks=scores.sinks,
            alibi_slopes=slopes,
            bias=tuple(bias),
            seen=seen,
            words=tuple(dict.fromkeys(words)),
        )
        if is_overtaken(output, {node for node in found.inputs if node is not None}, self._written):
            raise Refused("reads what is written to in place")
        return found

    def _peel(self, operands: Sequence[Operand]) -> list[Operand]:
        """Queries, keys and values; both keys and values without their repeats, or neither."""
        numbers = (self._reader.number, self._reader.number, lambda _: None)
        peeled = [peel(*pair) for pair in zip(operands, numbers, strict=True)]
        if peeled[1].repeats == peeled[2].repeats:
            return peeled
        return [peel(*pair, repeats=False) for pair in zip(operands, numbers, strict=True)]

    def _read_terms(self, scores: Scores, hides_rows: bool, heads: int) -> tuple[Seen, list[Term], Tensor | None]:
        """What the masks show in words, the terms that there are no words for, and [H] slopes if these are ALiBi."""
        terms = [summand for term in scores.terms for summand in self._summands(term)]
        masks = [term for term in terms if self._masks.is_mask(term)]
        bias = [term for term in terms if term not in masks]
        seen = self._masks.read(masks, scores.causal)
        for factor in scores.factors:
            if seen is None or not self._masks.is_one_where_seen(factor, seen):
                raise Refused(f"multiplies its scores by {factor.node}, which hides none of them for good")
        slopes = self._read_slopes(scores, seen, masks, bias, heads) if seen else None
        if seen and slopes is not None:
            return seen, [], slopes
        if hides_rows and (bias or seen is None):
            self._check_rows(terms, scores.causal)
        # Where a bias hides all that a mask shows, the rest must be as low as it was, which a mask in words is not.
        if seen is None or (masks and any(self._may_hide(term) for term in bias)):
            return Seen(scores.causal), terms, None
        return seen, bias, None

    def _read_slopes(
        self, scores: Scores, seen: Seen, masks: Sequence[Term], bias: Sequence[Term], num_heads: int
    ) -> Tensor | None:
        """[H] float32 where `bias` is ALiBi and nothing else, and reaches nowhere near what `masks` hide."""
        if len(bias) != 1 or bias[0].node not in self._known:
            return None
        has_sinks = scores.sinks is not None
        key = (bias[0].node, bias[0].factor, num_heads, seen, has_sinks)
        if key not in self._alibi:
            self._alibi[key] = read_alibi(self._masks, bias[0], num_heads, seen, has_sinks=has_sinks)
        alibi = self._alibi[key]
        if alibi is None or not all(self._masks.is_mask(mask, -_FARTHER * alibi.reach) for mask in masks):
            return None
        return alibi.slopes

    def _summands(self, term: Term) -> list[Term]:
        """`term` in parts, where a mask and a bias were added to each other first."""
        node = term.node
        is_sum = term.role == "add" and node.target is aten.add.Tensor and not node.kwargs
        parts = [arg for arg in node.args if isinstance(arg, fx.Node)] if is_sum else []
        if len(parts) != 2 or (parts[0] in self._known) == (parts[1] in self._known):
            return [term]
        return [summand for part in parts for summand in self._summands(replace(term, node=part))]

    def _check_rows(self, terms: Sequence[Term], causal: bool) -> None:
        """Refuse terms that may hide everything from some query, for which SDPA gives zeros."""
        for term in terms:
            if term.node in self._known:
                continue
            if term.role != "add":
                raise Refused("has a mask that depends on data, and may hide everything from some query")
            if self._may_hide(term):
                raise Refused("has a bias that may hide everything from some query")
        self._masks.check_rows([term for term in terms if term.node in self._known], causal)

    def _may_hide(self, term: Term) -> bool:
        """Whether what `term` adds may be as low as a mask."""
        if term.role != "add":
            return True
        if term.node in self._known:
            return self._masks.may_hide(term)
        sources = [node for node in cone(term.node) if node.op == "placeholder"]
        is_given = any(VALUE.of(node).is_floating_point() for node in sources if VALUE.on(node))
        return is_given or any(number <= HIDDEN for number in constants(term.node))


def is_sdpa(node: fx.Node) -> bool:
    """Whether `node` is a scaled_dot_product_attention, or the first result of what dispatch makes of one."""
    if node.target is operator.getitem and node.args[1] == 0:
        return any(map(is_fused, node.all_input_nodes))
    return node.target is SDPA


def is_fused(node: fx.Node) -> bool:
    """Whether `node` is what dispatch makes of a scaled_dot_product_attention."""
    return node.target in _FUSED


class _Weighed(NamedTuple):
    """The `product` of weights and values at `output`; whether a last entry of the weights was cut off before."""

    output: fx.Node
    product: Product
    is_cut: bool


def _weighed(node: fx.Node) -> _Weighed | None:
    """The product that a softmax's result is a factor of."""
    *line, output = _line_of_users(node) or [node]
    if output is node or VALUE.of(output).dim() < 3:
        return None
    weights = next(factor for factor in factors_of(output) if factor in (node, *line))
    is_cut = any(user.target is aten.slice.Tensor for user in line)
    return _Weighed(output, as_weighed(output, weights), is_cut)


def _line_of_users(node: fx.Node) -> list[fx.Node]:
    """From a softmax down to the first product, through what leaves its weights as they are."""
    line: list[fx.Node] = []
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user.target in PRODUCTS and _is_weighed(user, (node, *line)):
            return [*line, user]
        if user.target in _PASSED or is_cast(user) or keeps_rows(user) or drops_nothing(user) or _cuts_last(user):
            line.append(user)
            waiting += user.users
    return []


def _is_weighed(node: fx.Node, weights: Collection[fx.Node]) -> bool:
    factors = factors_of(node)
    return any(factor in weights for factor in (factors if node.target is EINSUM else factors[:1]))


def _cuts_last(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    ndim = VALUE.of(node).dim()
    return tuple(node.args[1:]) in ((-1, 0, -1), (ndim - 1, 0, -1), (-1, None, -1), (ndim - 1, None, -1))


def _check_used_once(node: fx.Node, output: fx.Node) -> None:
    while node is not output:
        if len(node.users) > 1:
            raise Refused("has weights that are used elsewhere too")
        node = next(iter(node.users))


def _check_recorded(operands: Sequence[Operand]) -> None:
    if not all(VALUE.on(operand.node) for operand in operands):
        raise Refused("has inputs without recorded shapes")


def _check_lengths(operands: Sequence[Operand]) -> None:
    query, key, value = operands
    if not all(statically_known_true(query.length == size) for size in (key.length, value.length)):
        raise Refused("has keys that are not this sequence's own tokens: they are of another length")


def _heads_of(key: Operand, value: Operand, scores: Scores, product: Product, output: fx.Node) -> int | None:
    """The number of query heads that something other than the queries tells."""
    told = [operand.num_heads * operand.repeats for operand in (key, value) if operand.num_heads is not None]
    told += [term.shape[1] for term in scores.terms if len(term.shape) == 4]
    if product.dims == "nsd":
        told += [VALUE.of(user).shape[1] for user in output.users if keeps_rows(user) and VALUE.of(user).dim() == 4]
    return next((heads for heads in told if isinstance(heads, int)), None)


def _describe(seen: Seen, bias: Sequence[Term]) -> list[str]:
    mask = "causal" if seen.causal else "full"
    words = [mask, seen.span.name.partition("_")[0]] if seen.span.longest is not None else [mask]
    return [" ".join(words), *(["bias"] if bias else [])]
