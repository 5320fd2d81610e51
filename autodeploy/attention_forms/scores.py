"""What goes into a softmax, read backwards: softcap(Q Kᵀ · scale) plus terms, from whatever ops a model wrote it in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from autodeploy.attention_forms.evaluate import Evaluator, Refused
from autodeploy.attention_forms.products import EINSUM, PRODUCTS, as_scores
from autodeploy.attention_forms.written import is_whole, mask_of_put
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten
# What a mask puts in place of a score, at least. Models put -1e4 there, or the smallest float16, which the scale of
# heads of 256 features makes -4094. Beside a score above -3896 no weight is left of it: exp(-104) is 0 in float32.
HIDDEN = -4000.0


@dataclass(frozen=True)
class Term:
    """One tensor that changes scores: `add`ed with a factor, `multiply`ing, or a bool that `keep`s or `drop`s them.

    What is dropped becomes `fill`. `shape` is that of the scores there: [B, H, S, S], [B * H, S, S] or [B, K, G, S, S].
    """

    node: fx.Node
    role: Literal["add", "keep", "drop", "multiply"]
    shape: torch.Size
    factor: float = 1.0
    fill: float = -math.inf


@dataclass(frozen=True)
class Scores:
    """Scores as far as they have been read.

    `query_dims` and `key_dims` name the dimensions of the two (`heads`); `softcap` is what tanh(scale QK) is multiplied
    by, `terms` are in order, and `factors` multiply scores, those that are seen by one. `words` name the forms on the
    way, for the table of forms.
    """

    query: fx.Node
    key: fx.Node
    query_dims: str
    key_dims: str
    scale: float = 1.0
    softcap: float | None = None
    terms: tuple[Term, ...] = ()
    factors: tuple[Term, ...] = ()
    sinks: fx.Node | None = None
    causal: bool = False
    words: tuple[str, ...] = field(default=())

    def times(self, factor: float) -> Scores:
        self._check_no_sinks()
        terms = tuple(replace(term, factor=term.factor * factor, fill=term.fill * factor) for term in self.terms)
        if factor <= 0:
            raise Refused(f"multiplies its scores by {factor}")
        if self.softcap is None:
            return replace(self, scale=self.scale * factor, terms=terms)
        return replace(self, softcap=self.softcap * factor, terms=terms)

    def plus(self, term: Term, word: str) -> Scores:
        self._check_no_sinks()
        return replace(self, terms=(*self.terms, term), words=(*self.words, word))

    def _check_no_sinks(self) -> None:
        if self.sinks is not None:
            raise Refused("changes its scores after a further logit has joined them")


class ScoreReader:
    """Reads scores in a graph of which the nodes in `known` can be evaluated."""

    def __init__(self, gm: fx.GraphModule, known: set[fx.Node]) -> None:
        self._constants = Evaluator(gm, {})
        self._known = known
        self._read: dict[fx.Node, Scores | None] = {}

    def read(self, node: fx.Node) -> Scores | None:
        """The scores that `node` holds, or None where it does not come from a product of queries and keys.

        Raises Refused where it does, in a way that the canonical op cannot express.
        """
        if node not in self._read:
            self._read[node] = self._read_new(node)
        return self._read[node]

    def _read_new(self, node: fx.Node) -> Scores | None:
        if node.op != "call_function":
            return None
        if node.target in (*PRODUCTS, aten.baddbmm.default):
            return self._product(node)
        if node.target in _SAME or _keeps_scores(node):
            return self.read(node.all_input_nodes[0])
        reader = _READERS.get(node.target)
        return reader(self, node) if reader else None

    def number(self, value: Any) -> float | None:
        """`value` as a number, where it is one or a constant tensor of one entry."""
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node) or value not in self._known:
            return None
        recorded = VALUE.get(value)
        is_single = isinstance(recorded, Tensor) and statically_known_true(recorded.numel() == 1)
        return float(self._constants(value)) if is_single and not _is_symbolic(value) else None

    def _product(self, node: fx.Node) -> Scores | None:
        product = as_scores(node)
        if product is None:
            return None
        name = "einsum" if node.target is EINSUM else node.target._opname  # type: ignore[union-attr]
        scores = Scores(product.left, product.right, product.left_dims, product.right_dims, words=(name,))
        if node.target is not aten.baddbmm.default:
            return scores
        factors = [self.number(node.kwargs.get(name, 1)) for name in ("alpha", "beta")]
        if None in factors:
            return None
        scores = scores.times(factors[0] or 0.0)
        return scores.plus(_term(node, node.args[0], "add", factor=factors[1]), "added") if factors[1] else scores

    def _mul(self, node: fx.Node) -> Scores | None:
        first, second = node.args
        return self._times(node, first, second) or self._times(node, second, first)

    def _div(self, node: fx.Node) -> Scores | None:
        return self._times(node, node.args[0], node.args[1], power=-1)

    def _times(self, node: fx.Node, scores: Any, factor: Any, *, power: int = 1) -> Scores | None:
        inner = self.read(scores) if isinstance(scores, fx.Node) else None
        if inner is None:
            return None
        number = self.number(factor)
        if number is None and factor in self._known:
            if inner.terms or power != 1:
                raise Refused(f"multiplies its scores by {factor}, which hides none of them for good")
            term = Term(factor, "multiply", VALUE.of(node).shape)
            return replace(inner, factors=(*inner.factors, term), words=(*inner.words, "multiplied"))
        if not number:
            raise Refused(f"scales its scores by {factor}, which is not a constant")
        return inner.times(number**power)

    def _tanh(self, node: fx.Node) -> Scores | None:
        inner = self.read(_node(node.args[0]))
        if inner is None:
            return None
        if inner.terms or inner.softcap is not None:
            raise Refused("adds to its scores, or masks them, before the softcap")
        return replace(inner, softcap=1.0, words=(*inner.words, "softcap"))

    def _add(self, node: fx.Node) -> Scores | None:
        alpha = self.number(node.kwargs.get("alpha", 1))
        first, second = node.args
        inner = self.read(first) if isinstance(first, fx.Node) else None
        added, factor = second, alpha
        if inner is None and alpha == 1 and isinstance(second, fx.Node):
            inner, added, factor = self.read(second), first, 1.0
        if inner is None:
            return None
        return inner.plus(_term(node, added, "add", factor=factor), "added")

    def _sub(self, node: fx.Node) -> Scores | None:
        first, second = node.args
        inner = self.read(_node(first)) if isinstance(first, fx.Node) else None
        if inner is None or not isinstance(second, fx.Node):
            return None
        if _is_maximum_of(second, _node(first)):
            return inner  # a softmax does not see what is the same along a row
        alpha = self.number(node.kwargs.get("alpha", 1))
        return inner.plus(_term(node, second, "add", factor=alpha and -alpha), "added")

    def _where(self, node: fx.Node) -> Scores | None:
        mask, kept, other = node.args
        if isinstance(kept, fx.Node) and (inner := self.read(kept)):
            return inner.plus(_term(node, mask, "keep", fill=self.number(other)), "where")
        if isinstance(other, fx.Node) and (inner := self.read(other)):
            return inner.plus(_term(node, mask, "drop", fill=self.number(kept)), "where")
        return None

    def _masked_fill(self, node: fx.Node) -> Scores | None:
        scores, mask, fill = node.args
        inner = self.read(_node(scores))
        return inner and inner.plus(_term(node, mask, "drop", fill=self.number(fill)), "masked_fill")

    def _index_put(self, node: fx.Node) -> Scores | None:
        inner = self.read(_node(node.args[0]))
        if inner is None:
            return None
        found = mask_of_put(node)
        if found is None:
            raise Refused("writes to its scores at places that are no mask of theirs")
        return inner.plus(_term(node, found[0], "drop", fill=self.number(found[1])), "masked_fill")

    def _slice_scatter(self, node: fx.Node) -> Scores | None:
        return self.read(_node(node.args[1])) if is_whole(node) else None

    def _clamp(self, node: fx.Node) -> Scores | None:
        scores, low = _node(node.args[0]), self.number(node.args[1])
        if low is None or low > HIDDEN or len(node.args) > 2 or node.kwargs:
            return None
        return self.read(scores)

    def _cat(self, node: fx.Node) -> Scores | None:
        tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if not isinstance(tensors, list | tuple) or len(tensors) != 2 or dim not in (-1, VALUE.of(node).dim() - 1):
            return None
        inner = self.read(_node(tensors[0]))
        if inner is None:
            return None
        heads = VALUE.of(node).shape[1]
        sinks = _per_head(_node(tensors[1]), heads) if VALUE.of(node).dim() == 4 else None
        if sinks is None:
            raise Refused("has a further logit that is not one number per head")
        return replace(inner, sinks=sinks, words=(*inner.words, "sinks"))


def is_cast(node: fx.Node) -> bool:
    """Whether `node` only turns floats into other floats."""
    if node.target not in _CASTS:
        return False
    before, after = (VALUE.of(n) for n in (node.all_input_nodes[0], node))
    return before.is_floating_point() and after.is_floating_point() and before.device == after.device


def drops_nothing(node: fx.Node) -> bool:
    """Whether `node` is a dropout that does nothing. Raises Refused for one that does."""
    if node.target not in (aten.dropout.default, aten.native_dropout.default):
        return False
    if node.args[1] and node.args[2]:
        raise Refused("has dropout; call model.eval() before tracing")
    return node.target is aten.dropout.default


def keeps_rows(node: fx.Node) -> bool:
    """Whether `node` is a view that merges or splits leading dimensions and leaves the last two as they are."""
    if node.target not in _VIEWS:
        return False
    before, after = (VALUE.of(n).shape for n in (node.all_input_nodes[0], node))
    same_rows = min(len(before), len(after)) > 2 and statically_known_true(sym_eq(before[-2:], after[-2:]))
    return same_rows and statically_known_true(sym_eq(math.prod(before[:-2]), math.prod(after[:-2])))


def _keeps_scores(node: fx.Node) -> bool:
    return is_cast(node) or keeps_rows(node) or drops_nothing(node)


def _term(node: fx.Node, operand: Any, role: Any, *, factor: float | None = 1.0, fill: float | None = None) -> Term:
    if not isinstance(operand, fx.Node) or factor is None:
        raise Refused(f"adds {operand} to its scores")
    if role != "add" and fill is None:
        raise Refused("replaces masked scores by something that is not a number")
    if role != "add" and fill is not None and fill > HIDDEN:
        raise Refused(f"replaces masked scores by {fill:g}, which other scores may come near")
    return Term(operand, role, VALUE.of(node).shape, factor, -math.inf if fill is None else fill)


def _is_maximum_of(node: fx.Node, scores: fx.Node) -> bool:
    """Whether `node` is the maximum of each row of `scores`."""
    if node.target is aten.amax.default:
        return node.args[:3] in ((scores, [-1], True), (scores, (-1,), True))
    source = node.args[0] if node.op == "call_function" else None
    return isinstance(source, fx.Node) and source.target is aten.max.dim and source.args == (scores, -1, True)


def _per_head(node: fx.Node, num_heads: Any) -> fx.Node | None:
    """The tensor [H] that `node` [B, H, S, 1] repeats, if it does."""
    while node.target in (*_VIEWS, aten.expand.default, aten.expand_as.default) or is_cast(node):
        shape = VALUE.of(node).shape
        if len(shape) == 1:
            break
        if node.target not in (aten.expand.default, aten.expand_as.default) and shape != (1, num_heads, 1, 1):
            return None
        node = node.all_input_nodes[0]
    return node if tuple(VALUE.of(node).shape) == (num_heads,) else None


def _is_symbolic(node: fx.Node) -> bool:
    return any(isinstance(VALUE.get(arg), torch.SymInt) for arg in node.all_input_nodes)


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default, aten.to.other)
_SAME = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default})
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
_READERS: dict[Any, Callable[[ScoreReader, fx.Node], Scores | None]] = {
    aten.mul.Tensor: ScoreReader._mul,
    aten.mul.Scalar: ScoreReader._mul,
    aten.div.Tensor: ScoreReader._div,
    aten.div.Scalar: ScoreReader._div,
    aten.tanh.default: ScoreReader._tanh,
    aten.add.Tensor: ScoreReader._add,
    aten.sub.Tensor: ScoreReader._sub,
    aten.where.self: ScoreReader._where,
    aten.where.ScalarOther: ScoreReader._where,
    aten.where.ScalarSelf: ScoreReader._where,
    aten.masked_fill.Scalar: ScoreReader._masked_fill,
    aten.masked_fill.Tensor: ScoreReader._masked_fill,
    aten.maximum.default: ScoreReader._clamp,
    aten.max.other: ScoreReader._clamp,
    aten.clamp_min.default: ScoreReader._clamp,
    aten.clamp.default: ScoreReader._clamp,
    aten.cat.default: ScoreReader._cat,
    aten.index_put.default: ScoreReader._index_put,
    aten.slice_scatter.default: ScoreReader._slice_scatter,
}
