"""Which of the terms added to scores are a mask that has a closed form, found by asking for their values.

A mask that depends on positions, sizes and constants alone is a function of the places of its query and its key. It is
compared with what the canonical op can say in words, causality and a span, for all pairs up to the model's largest
position. Where positions are an input, they are asked as 0, 1, 2, ... in every row: a row is one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.attention_forms.evaluate import Refused, cone, is_positions
from autodeploy.attention_forms.places import Value, Values, aten, places_of
from autodeploy.attention_forms.scores import HIDDEN, Term
from autodeploy.attention_forms.square import Square
from autodeploy.attention_forms.unfold import unfolder
from autodeploy.attention_forms.unfolder import Unfolder
from autodeploy.graph.edit import look_at
from autodeploy.graph.meta import NUM_POSITIONS, VALUE
from autodeploy.metadata.span import Chunk, Full, Span, Window

# Where nothing tells how long sequences may be; the longest that models of today are made for is about that.
LARGEST = 1 << 20
_MAX_HEADS = 256
_ROWS = 9


@dataclass(frozen=True)
class Seen:
    """A query sees no key after it if `causal`, and keys in its span; not `causal`, it also has to be in theirs."""

    causal: bool
    span: Span = field(default_factory=Full)

    def value(self, values: Values) -> Value:
        """The same as a function of places."""
        query, key = values.query, values.key
        terms = [(query, key)] if self.causal else []
        if self.span.longest is not None:
            begins = (self.span.first_seen(_Position(values, place)).value for place in (query, key))
            terms += zip((key, query), begins, strict=True)
        seen = values.constant(torch.tensor([True]), 0)
        for late, early in terms:
            follows = values.apply(aten.ge.Tensor, late, early, dtype=torch.bool)
            seen = values.apply(aten.logical_and.default, seen, follows, dtype=torch.bool)
        return seen


@dataclass(frozen=True)
class _Position:
    """A place with the arithmetic that spans ask of a position."""

    values: Values
    value: Value

    def __add__(self, other: int) -> _Position:
        return self._by(aten.add.Scalar, other)

    def __sub__(self, other: int) -> _Position:
        return self._by(aten.sub.Scalar, other)

    def __mul__(self, other: int) -> _Position:
        return self._by(aten.mul.Scalar, other)

    def __floordiv__(self, other: int) -> _Position:
        return self._by(aten.floor_divide.default, other)

    def _by(self, op: Any, other: int) -> _Position:
        return _Position(self.values, self.values.apply(op, self.value, other, dtype=torch.int64))


def read_form(square: Square, values: Values, seen: Value) -> Seen | None:
    """What says in words which pairs the bool `seen` is true of; None where there are no words for it.

    Raises Refused where that cannot be decided.
    """
    index_L = torch.arange(square.longest)
    _, longest = square.at(seen, index_L, index_L)
    first_L, _ = square.at(seen, index_L[:1], index_L[:longest])
    by_L, _ = square.at(seen, index_L[:longest], index_L[:1])
    is_causal, num_seeing = longest > 1 and not bool(first_L[1:].any()), int(by_L.sum())
    # The first key is seen by as many queries as a window or a chunk has tokens.
    spans = [Full()] if num_seeing == longest else [Window(num_seeing), Chunk(num_seeing)] if num_seeing else []
    # Most of what is something else shows so in a few rows, and would take longer to be proved so.
    row_R1 = torch.linspace(0, longest - 1, min(longest, _ROWS)).long()[:, None]
    for form in (Seen(is_causal, span) for span in spans):
        is_form = values.apply(aten.eq.Tensor, seen, form.value(values), dtype=torch.bool)
        is_like, _ = square.at(is_form, row_R1, index_L[None, :longest])
        if bool(is_like.all()) and square.holds(is_form):
            return form
    return None


class Sizes:
    """Gives the symbols in the shapes of a graph's inputs numbers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._symbols: set[Any] = set()
        self.lengths: set[Any] = set()
        for node in gm.graph.find_nodes(op="placeholder"):
            value = VALUE.get(node)
            sizes = [*value.shape] if isinstance(value, Tensor) else [value]
            self._symbols.update(*map(_symbols, sizes))
            if is_positions(node):
                self.lengths |= _symbols(sizes[-1])

    def at(self, length: Any, asked: int, others: int) -> dict[Any, int]:
        """`asked` for the symbolic `length` and that of positions, `others` for the rest.

        Raises Refused where `length` is no symbol.
        """
        if not isinstance(length, torch.SymInt):
            return dict.fromkeys(self._symbols, others)
        if not length.node.expr.is_Symbol:
            raise Refused(f"has a length of {length}, which cannot be chosen freely")
        return dict.fromkeys(self._symbols, others) | dict.fromkeys({length.node.expr, *self.lengths}, asked)


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


class Masks:
    """Asks for the masks of one graph; each one once."""

    def __init__(self, gm: fx.GraphModule, known: set[fx.Node], sizes: Sizes) -> None:
        self._gm = gm
        self._known = known
        self._sizes = sizes
        self._values = Values()
        self._askers: dict[str, tuple[Unfolder, Square]] = {}

    def is_mask(self, term: Term, hidden: float = HIDDEN) -> bool:
        """Whether `term` is known to leave scores as they are or make them as low as `hidden`, and do nothing else."""
        if term.node not in self._known:
            return False
        if term.role != "add":
            return term.fill <= hidden
        shown, low = (self._compared(term, op, limit) for op, limit in ((aten.eq.Scalar, 0), (aten.le.Scalar, hidden)))
        return self._always(term, shown and low and self._bool(aten.logical_or.default, shown, low))

    def may_hide(self, term: Term) -> bool:
        """Whether `term`, which is known and added, may hide anything."""
        return not self._always(term, self._compared(term, aten.gt.Scalar, HIDDEN))

    def is_one_where_seen(self, term: Term, seen: Seen) -> bool:
        """Whether `term`, which multiplies scores, leaves all as they are that a query sees."""
        hidden = self._bool(aten.logical_not.default, seen.value(self._values))
        same = self._compared(term, aten.eq.Scalar, 1)
        is_one = self._always(term, same and self._bool(aten.logical_or.default, hidden, same))
        if is_one:
            self.note(term)
        return is_one

    def check_rows(self, terms: Sequence[Term], causal: bool) -> None:
        """Raise Refused where `terms`, which are known, may hide everything from some query together."""
        try:
            seen = reduce(self._and, map(self._visible, terms), Seen(causal).value(self._values))
            square = self._asker(terms[0])[1] if terms else None
            each = self._each_head(seen)
            sees = square is None or all(square.every_query_sees(value) for value in each)
        except Refused as refused:
            raise Refused(f"has a mask that may hide everything from some query: it {refused}") from refused
        if not sees:
            raise Refused("has a mask that hides everything from some query")

    def read(self, terms: Sequence[Term], causal: bool) -> Seen | None:
        """What a query sees under all of `terms`, which are masks; None where that has no closed form."""
        if not terms:
            return Seen(causal)
        try:
            seen = reduce(self._and, map(self._visible, terms), Seen(causal).value(self._values))
            form = read_form(self._asker(terms[0])[1], self._values, seen)
        except Refused:
            return None
        for term in terms if form else ():
            self.note(term)
        return form

    def unfold(self, term: Term, places: Sequence[Value]) -> tuple[Value, Square]:
        """`term` where its dimensions but the last two stand at `places`, and the pairs of those two."""
        unfold, square = self._asker(term)
        return unfold(term.node, [*places, self._values.query, self._values.key]), square

    @property
    def values(self) -> Values:
        return self._values

    def note(self, term: Term) -> None:
        """Note that the values that `term` is made of are part of the graph from now on."""
        for node in cone(term.node):
            if node.op == "get_attr":
                look_at(self._gm, str(node.target))

    def _asker(self, term: Term) -> tuple[Unfolder, Square]:
        length = term.shape[-1]
        if str(length) not in self._askers:
            longest = self._longest(length)
            same = self._sizes.lengths
            unfold = unfolder(self._gm, self._known, self._values, length, longest, same_lengths=same)
            self._askers[str(length)] = unfold, Square(self._values, longest)
        return self._askers[str(length)]

    def _longest(self, length: Any) -> int:
        """The model's largest position, and one."""
        if not isinstance(length, torch.SymInt):
            return length
        upper = length.node.shape_env.bound_sympy(length.node.expr).upper
        asked = NUM_POSITIONS.get(self._gm, LARGEST)
        return int(upper) if upper < asked else asked

    def _entry(self, term: Term) -> Value:
        """The entry of `term` in any head of any row of the batch."""
        sizes = enumerate(term.shape[:-2])
        places = [self._values.place(f"dim{dim}", size if isinstance(size, int) else None) for dim, size in sizes]
        return self.unfold(term, places)[0]

    def _visible(self, term: Term) -> Value:
        """A bool: whether `term` hides nothing there."""
        if term.role == "add":
            return self._bool(aten.gt.Scalar, self._scaled(term), HIDDEN)
        entry = self._entry(term)
        return entry if term.role == "keep" else self._bool(aten.logical_not.default, entry)

    def _scaled(self, term: Term) -> Value:
        entry = self._entry(term)
        if term.factor == 1:
            return entry
        return self._values.apply(aten.mul.Scalar, entry, term.factor, dtype=entry.dtype, is_scalar=entry.is_scalar)

    def _compared(self, term: Term, op: Any, limit: float) -> Value | None:
        try:
            return self._bool(op, self._scaled(term), limit)
        except Refused:
            return None

    def _always(self, term: Term, value: Value | None) -> bool:
        try:
            return value is not None and all(map(self._asker(term)[1].holds, self._each_head(value)))
        except Refused:
            return False

    def _each_head(self, value: Value) -> Iterator[Value]:
        """`value` in each head of those that it depends on."""
        places = places_of(value) - {self._values.query, self._values.key}
        heads = sorted(places, key=lambda place: place.name)
        if any(place.size is None for place in heads) or math.prod(place.size or 1 for place in heads) > _MAX_HEADS:
            raise Refused("cannot be asked: it differs with the length or the row of the batch")
        for chosen in product(*(range(place.size or 1) for place in heads)):
            given = zip(heads, (self._values.constant(torch.tensor([index]), 0) for index in chosen), strict=True)
            yield self._values.replace(value, dict(given))

    def _bool(self, op: Any, *args: Any) -> Value:
        return self._values.apply(op, *args, dtype=torch.bool)

    def _and(self, one: Value, other: Value) -> Value:
        return self._bool(aten.logical_and.default, one, other)
