"""Finds the attention around a softmax or a scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autodeploy.attention_forms.asked import Masks, Seen, Sizes
from autodeploy.attention_forms.evaluate import Knowledge, Refused, cone, constants
from autodeploy.attention_forms.found import Attention
from autodeploy.attention_forms.heads import Operand, num_heads, peel
from autodeploy.attention_forms.in_place import is_overtaken
from autodeploy.attention_forms.linear import Alibi, read_alibi
from autodeploy.attention_forms.scores import HIDDEN, ScoreReader, Scores, Term, drops_nothing, is_cast, keeps_rows
from autodeploy.attention_forms.unfolder import arguments_of
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
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
        return self._sdpa(node) if node.target is SDPA else self._softmax(node, hides_rows)

    def _softmax(self, node: fx.Node, hides_rows: bool) -> Attention | None:
        found = _weighted_product(node)
        if found is None:
            return None
        output, is_cut = found
        ndim = VALUE.of(node).dim()
        scores = self._reader.read(node.all_input_nodes[0]) if ndim > 2 else None
        if scores is None:
            raise Refused("weighs values by something other than queries times keys")
        if node.args[1] not in (-1, ndim - 1):
            raise Refused("has a softmax over another dimension than the keys")
        if is_cut != (scores.sinks is not None):
            raise Refused("drops some of its weights")
        _check_used_once(node, output)
        scores = replace(scores, words=("flex_attention" if hides_rows else "softmax", *scores.words))
        value = output.args[1]
        assert isinstance(value, fx.Node)
        return self._attention(output, scores, value, hides_rows=hides_rows)

    def _sdpa(self, node: fx.Node) -> Attention:
        arguments = arguments_of(node)
        query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
        if arguments["dropout_p"]:
            raise Refused("has dropout; call model.eval() before tracing")
        shape = VALUE.of(query).shape
        scale = arguments["scale"]
        scale = shape[-1] ** -0.5 if scale is None else scale
        if not isinstance(scale, int | float):
            raise Refused("has a scale that is not a number")
        if len(shape) not in (3, 4):
            raise Refused(f"has queries of {len(shape)} dimensions")
        scores = Scores(query, key, scale, causal=bool(arguments["is_causal"]), words=("sdpa",))
        if scores.causal:
            scores = replace(scores, words=("sdpa", "is_causal"))
        if mask is not None:
            role = "keep" if VALUE.of(mask).dtype is torch.bool else "add"
            scores_shape = torch.Size([*shape[:-1], VALUE.of(key).shape[-2]])
            scores = scores.plus(Term(mask, role, scores_shape), "bool mask" if role == "keep" else "float mask")
        return self._attention(node, scores, value, hides_rows=True, is_transposed=False)

    def _attention(
        self, output: fx.Node, scores: Scores, value: fx.Node, *, hides_rows: bool, is_transposed: bool = True
    ) -> Attention:
        operands = [Operand(scores.query), Operand(scores.key, is_transposed=is_transposed), Operand(value)]
        _check_recorded(operands)
        _check_lengths(operands)
        query, key, value_operand = self._peel(operands)
        heads = num_heads(query, _heads_of(key, value_operand, scores, output))
        kv_heads = num_heads(key, heads)
        if num_heads(value_operand, kv_heads) != kv_heads or heads % kv_heads:
            raise Refused(f"has {heads} query heads on {kv_heads} key heads and another number of value heads")
        seen, bias, slopes = self._read_terms(scores, hides_rows, heads)
        words = [*scores.words, *_describe(seen, bias), *(["ALiBi"] if slopes is not None else [])]
        words += ["grouped heads"] if kv_heads < heads else []
        found = Attention(
            output=output,
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


def _weighted_product(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The matrix product that a softmax's result is the left factor of, and whether a last entry was cut off before."""
    is_cut = False
    for user in _line_of_users(node):
        if user.target in _PRODUCTS:
            return (user, is_cut) if VALUE.of(user).dim() > 2 else None
        if user.target is aten.slice.Tensor:
            is_cut = True
    return None


def _line_of_users(node: fx.Node) -> list[fx.Node]:
    """From a softmax down to the first product, through what leaves its weights as they are."""
    line: list[fx.Node] = []
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user.target in _PRODUCTS and user.args[0] in (node, *line):
            return [*line, user]
        if user.target is aten.einsum.default and VALUE.of(node).dim() > 3:
            raise Refused("weighs values with an einsum")
        if user.target in _PASSED or is_cast(user) or keeps_rows(user) or drops_nothing(user) or _cuts_last(user):
            line.append(user)
            waiting += user.users
    return []


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
    num_keys = key.shape[-1] if key.is_transposed else key.shape[-2]
    if not all(statically_known_true(query.shape[-2] == size) for size in (num_keys, value.shape[-2])):
        raise Refused("has keys that are not this sequence's own tokens: they are of another length")


def _heads_of(key: Operand, value: Operand, scores: Scores, output: fx.Node) -> int | None:
    """The number of query heads that something other than the queries tells."""
    told = [operand.shape[1] * operand.repeats for operand in (key, value) if len(operand.shape) == 4]
    told += [term.shape[1] for term in scores.terms if len(term.shape) == 4]
    told += [VALUE.of(user).shape[1] for user in output.users if keeps_rows(user) and VALUE.of(user).dim() == 4]
    return next((heads for heads in told if isinstance(heads, int)), None)


def _describe(seen: Seen, bias: Sequence[Term]) -> list[str]:
    mask = "causal" if seen.causal else "full"
    words = [mask, seen.span.name.partition("_")[0]] if seen.span.longest is not None else [mask]
    return [" ".join(words), *(["bias"] if bias else [])]
