"""Which of the terms added to scores are a mask that has a closed form, found by asking for their values.

A mask that depends on positions, sizes and constants alone is evaluated at several lengths, one of them beyond every
number in its code, and compared entry by entry with what the canonical op can say in words: everything, causal, a
window. Where positions are an input, they are asked as 0, 1, 2, ... in every row: a row is one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.attention_forms.evaluate import Evaluator, Refused, cone, constants, is_positions
from autodeploy.attention_forms.scores import HIDDEN, Term

_SMALL = (5, 33)
_MAX_LENGTH = 8200  # a bool [S, S] of this length is 67 MB
_MAX_CONSTANT = 2**31  # larger ones are ends of slices, not distances
_ROWS = 2
_HIDES_A_ROW = "has a mask that hides everything from some query"


@dataclass(frozen=True)
class Seen:
    """A query at position i sees keys j <= i if `causal`, and only |i - j| < `window` if there is one."""

    causal: bool
    window: int | None = None

    def matrix(self, length: int, device: torch.device) -> Tensor:
        """[S, S] bool."""
        index_S = torch.arange(length, device=device)
        distance_SS = index_S[:, None] - index_S[None, :]
        seen_SS = distance_SS >= 0 if self.causal else torch.ones_like(distance_SS, dtype=torch.bool)
        return seen_SS if self.window is None else seen_SS & (distance_SS.abs() < self.window)


class Sizes:
    """Gives the symbols in the shapes of a graph's inputs numbers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._symbols: set[Any] = set()
        self._lengths: set[Any] = set()
        for node in gm.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            sizes = [*value.shape] if isinstance(value, Tensor) else [value]
            self._symbols.update(*map(_symbols, sizes))
            if is_positions(node):
                self._lengths |= _symbols(sizes[-1])

    def at(self, length: Any, asked: int, others: int) -> dict[Any, int]:
        """`asked` for the symbolic `length` and that of positions, `others` for the rest.

        Raises Refused where `length` is no symbol.
        """
        if not isinstance(length, torch.SymInt):
            return dict.fromkeys(self._symbols, others)
        if not length.node.expr.is_Symbol:
            raise Refused(f"has a length of {length}, which cannot be chosen freely")
        return dict.fromkeys(self._symbols, others) | dict.fromkeys({length.node.expr, *self._lengths}, asked)


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


class Masks:
    """Asks for the masks of one graph; each one once."""

    def __init__(self, gm: fx.GraphModule, known: set[fx.Node], sizes: Sizes) -> None:
        self._gm = gm
        self._known = known
        self._sizes = sizes
        self._are_masks: dict[Any, bool] = {}
        self._answers: dict[Any, Seen | Refused | None] = {}

    def is_mask(self, term: Term) -> bool:
        """Whether `term` shows scores or hides them and does nothing else."""
        if term.node not in self._known:
            return False
        if term.role != "add":
            return True
        key = (term.node, term.factor)
        if key not in self._are_masks:
            values = self.values(term)
            self._are_masks[key] = all(((value == 0) | (value * term.factor <= HIDDEN)).all() for _, value in values)
        return self._are_masks[key]

    def hides(self, term: Term) -> bool:
        """Whether `term`, which is added, hides anything."""
        return any((value <= HIDDEN).any() for _, value in self.values(term))

    def check_rows(self, term: Term) -> None:
        """Raise Refused where `term`, if it is added, hides everything from some query."""
        if term.role != "add":
            return
        if not all((value > HIDDEN).any(-1).all() for _, value in self.values(term)):
            raise Refused(_HIDES_A_ROW)

    def values(self, term: Term) -> Iterator[tuple[int, Tensor]]:
        """Each length that is asked, in ascending order, and what `term` is there."""
        return ((length, self._ask(term, length)) for length in self._lengths([term]))

    def read(self, terms: Sequence[Term], causal: bool) -> Seen | None:
        """What a query sees under all of `terms`, which are masks; None where that has no closed form.

        Raises Refused where some query sees nothing.
        """
        key = (tuple((term.node, term.role, term.factor) for term in terms), causal)
        if key not in self._answers:
            try:
                self._answers[key] = self._read(terms, causal)
            except Refused as refused:
                self._answers[key] = refused
        answer = self._answers[key]
        if isinstance(answer, Refused):
            raise answer
        return answer

    def _read(self, terms: Sequence[Term], causal: bool) -> Seen | None:
        if not terms:
            return Seen(causal)
        lengths = self._lengths(terms)
        answers = [self._seen(terms, length, causal) for length in lengths]
        if not all(seen.any(-1).all() for seen in answers):
            raise Refused(_HIDES_A_ROW)
        last = answers[-1].reshape(-1, *answers[-1].shape[-2:])[0]
        num_seen = int(last[-1].sum())
        form = Seen(not bool(last[0, 1:].any()), None if num_seen == len(last) else num_seen)
        if all(bool((seen == form.matrix(seen.shape[-1], seen.device)).all()) for seen in answers):
            return form
        return None

    def _seen(self, terms: Sequence[Term], length: int, causal: bool) -> Tensor:
        """[..., S, S] bool."""
        seen = Seen(causal).matrix(length, terms[0].node.meta["val"].device)
        for term in terms:
            value = self._ask(term, length)
            if term.role == "drop":
                value = ~value
            elif term.role == "add":
                value = value == 0
            seen = seen & value
        return seen

    def _ask(self, term: Term, length: int) -> Tensor:
        # More than one row where that is cheap: what differs from row to row has no closed form.
        batch = _ROWS if length in _SMALL else 1
        return Evaluator(self._gm, self._sizes.at(term.shape[-1], length, batch))(term.node)

    def _lengths(self, terms: Sequence[Term]) -> list[int]:
        """The lengths to ask at, in ascending order. Raises Refused where they would be too large."""
        own = terms[0].shape[-1]
        if not isinstance(own, torch.SymInt):
            return [own]
        numbers = [number for term in terms for number in _distances(term.node)]
        tables = [size for term in terms for size in _table_sizes(term.node)]
        # Twice the number shows what repeats, such as chunks; for large ones that would be too much memory.
        longest = max([_SMALL[1], *tables, *(2 * n + 3 if n < _MAX_LENGTH // 8 else n + 3 for n in numbers)])
        longest = min(longest, _upper_bound(own))
        if longest > _MAX_LENGTH:
            raise Refused(f"has a mask with the number {max(numbers + tables)}, too far away to ask")
        return sorted({length for length in _SMALL if length < longest} | {longest})


def _distances(node: fx.Node) -> list[int]:
    return [abs(int(n)) for n in constants(node) if 1 < abs(n) < _MAX_CONSTANT and n == int(n)]


def _table_sizes(node: fx.Node) -> list[int]:
    """The sizes of the constant matrices that a mask is cut out of: no sequence is longer than its mask."""
    tables = [arg.meta["val"] for arg in cone(node) if arg.op == "get_attr" and isinstance(arg.meta.get("val"), Tensor)]
    return [table.shape[-1] for table in tables if table.dim() > 1]


def _upper_bound(size: torch.SymInt) -> int:
    """The largest number that the symbol may stand for."""
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper < _MAX_CONSTANT else _MAX_CONSTANT
