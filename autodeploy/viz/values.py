"""What a node computes, as text: dtype, shape and device, with symbolic sizes left as they are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.shape_prop import TensorMetadata

from autodeploy.graph import sizes
from autodeploy.graph.meta import EXAMPLE_VALUE, TENSOR_META, VALUE

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_ATOM = re.compile(r"\w+|\([^()]*\)")  # what a product can be written of as it is
_SYMBOLS = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}


@dataclass(frozen=True)
class Value:
    """One output of a node. `shape` is None for a number, whose expression, where symbolic, is in `text`."""

    dtype: str
    shape: tuple[int | str, ...] | None = None
    device: str = ""
    text: str = ""

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype} {self.text}".strip()
        return f"{self.short_dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def short_dtype(self) -> str:
        """`f32` for float32, `i64` for int64."""
        letters = self.dtype.rstrip("0123456789")
        return _SHORT.get(letters, letters) + self.dtype[len(letters) :]


def read_values(node: fx.Node) -> tuple[Value, ...]:
    """The outputs that `node` is known to have, none where nothing was recorded."""
    for key in (VALUE, EXAMPLE_VALUE, TENSOR_META):
        if key.on(node):
            return value_leaves(key.of(node))
    return ()


def value_leaves(value: Any) -> tuple[Value, ...]:
    """One Value for each tensor or number in `value`, nested sequences and dicts flattened."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, torch.Tensor | TensorMetadata):
        device = str(getattr(value, "device", ""))
        return (Value(str(value.dtype).removeprefix("torch."), tuple(map(_size, value.shape)), device),)
    if isinstance(value, list | tuple):
        return tuple(leaf for item in value for leaf in value_leaves(item))
    if type(value) in _SYMBOLS:
        return (Value(_SYMBOLS[type(value)], text=sizes.text(value)),)
    if isinstance(value, bool | int | float):
        return (Value(type(value).__name__, text=str(value)),)
    return ()


def _size(size: int | torch.SymInt) -> int | str:
    # int() of a symbolic size would guard on it, and fails for one that depends on data.
    return size if type(size) is int else sizes.text(size)


def sum_bytes(values: Iterable[Value]) -> str:
    """Bytes of tensors together, in terms of their symbolic sizes: `64 + 8*T`."""
    products: Counter[tuple[str, ...]] = Counter()
    for value in values:
        if value.shape is not None:
            number, symbols = _item_size(value.dtype), []
            for size in value.shape:
                if isinstance(size, int):
                    number *= size
                else:
                    symbols.append(size if _ATOM.fullmatch(size) else f"({size})")
            products[tuple(sorted(symbols))] += number
    return " + ".join("*".join([str(number), *symbols]) for symbols, number in sorted(products.items())) or "0"


def _item_size(dtype: str) -> int:
    known = getattr(torch, dtype, None)
    return known.itemsize if isinstance(known, torch.dtype) else 1
