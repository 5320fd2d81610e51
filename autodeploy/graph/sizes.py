"""Sizes that may be symbolic, as readers see them: a number where one is needed, else in the names that were given."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
from torch import SymBool, SymFloat, SymInt, Tensor

Symbolic = SymInt | SymFloat | SymBool


def hint(size: int | SymInt) -> int:
    """`size`, or the number that it was traced with; 0 for one that depends on data."""
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else 0


def text(size: float | Symbolic) -> str:
    """`T + 2` rather than `s47 + 2`, where the symbol was named T; a tracer's own symbols have no other names."""
    return _written(_named(size)) if isinstance(size, Symbolic) else str(size)


@dataclass(frozen=True)
class Bytes:
    """Bytes of many tensors: `number` at the sizes they were traced with, `expression` at any; `unsized` counts nodes
    of unknown shape, which are not in it.
    """

    number: int = 0
    expression: str = "0"
    unsized: int = 0

    def __str__(self) -> str:
        here = f" ({self.number} as traced)" if self.expression != str(self.number) else ""
        return self.expression + here + (f" + {self.unsized} of unknown shape" if self.unsized else "")


NO_BYTES = Bytes()


def bytes_of(tensors: Iterable[Tensor], unsized: int = 0) -> Bytes:
    """The bytes of `tensors` together."""
    alike: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        shape = [size.node.expr if isinstance(size, SymInt) else size for size in tensor.shape]
        alike.setdefault((tensor.element_size(), *shape), []).append(tensor)
    number, total = 0, sympy.Integer(0)
    for same in alike.values():
        shape = [_named(size) if isinstance(size, SymInt) else size for size in same[0].shape]
        number += len(same) * num_bytes(same[0])
        total += len(same) * same[0].element_size() * sympy.prod(shape)
    return Bytes(number, _written(sympy.expand(total)), unsized)


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the elements of `tensor` at the sizes it was traced with."""
    return math.prod(map(hint, tensor.shape)) * tensor.element_size()


def _written(expression: Any) -> str:
    """As text; torch's floor division comes in two pairs of brackets within a product."""
    return re.sub(r"\(\(([^()]*)\)\)", r"(\1)", str(expression))


def _named(size: Symbolic) -> sympy.Expr:
    """The expression, each symbol by the name of its source where that is an identifier."""
    expression, env = size.node.expr, size.node.shape_env
    symbols = getattr(expression, "free_symbols", ())
    if env is None or not symbols:
        return expression
    names = {symbol: name for name, symbol in env.source_to_var.items() if symbol in symbols and name.isidentifier()}
    return expression.xreplace({symbol: sympy.Symbol(name, **symbol.assumptions0) for symbol, name in names.items()})
