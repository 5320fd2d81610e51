"""The two products of an attention, queries by keys and weights by values, as dimensions that have names.

The letters are those of `heads`. Scores and weights are [B, H, S, S], [B, K, G, S, S] or [B * H, S, S]; an einsum may
have the other dimensions in any order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from autodeploy.attention_forms.evaluate import Refused
from autodeploy.graph.along import arguments_of, einsum_labels
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten
EINSUM = aten.einsum.default
PRODUCTS = (aten.matmul.default, aten.bmm.default, EINSUM)
_LEADING = {1: "n", 2: "bh", 3: "bhg"}  # by the number of dimensions before the last two


class Product(NamedTuple):
    """Two factors and their dimensions, and those of the result."""

    left: Any
    right: Any
    left_dims: str
    right_dims: str
    dims: str


def factors_of(node: fx.Node) -> list[Any]:
    """What `node`, one of PRODUCTS, multiplies."""
    return list(arguments_of(node)["tensors"]) if node.target is EINSUM else list(node.args)


def standard_dims(node: fx.Node) -> str:
    """The dimensions of a left factor in a product of matrices."""
    return _LEADING.get(VALUE.of(node).dim() - 2, "") + "sd"


def as_scores(node: fx.Node) -> Product | None:
    """`node` as queries times keys; None for an einsum that is something else."""
    if node.target is not EINSUM:
        query, key = factors_of(node)[-2:]
        return Product(query, key, standard_dims(query), standard_dims(key)[:-2] + "ds", standard_dims(node))
    factors, labels, result = _einsum(node)
    if len(factors) != 2 or len(result) < 3:
        return None
    if result[-2] not in labels[0]:
        factors, labels = factors[::-1], labels[::-1]
    leading = _LEADING.get(len(result) - 2, "")
    names = dict(zip(result, leading, strict=False))
    names |= dict.fromkeys(set(labels[0]) & set(labels[1]) - set(result), "d")
    query, key = (_named(labels[factor], names, result[factor - 2]) for factor in (0, 1))
    if sorted(query) != sorted(leading + "sd") or not _is_right_factor(key):
        return None
    return Product(factors[0], factors[1], query, key, leading + "sd")


def as_weighed(node: fx.Node, weights: fx.Node) -> Product:
    """`node` as `weights` times values. Raises Refused for an einsum that is something else."""
    if node.target is not EINSUM:
        left, right = factors_of(node)
        return Product(left, right, standard_dims(left), standard_dims(right), standard_dims(node))
    factors, labels, result = _einsum(node)
    if factors and factors[0] is not weights:
        factors, labels = factors[::-1], labels[::-1]
    if len(factors) == 2:
        leading = _LEADING.get(len(labels[0]) - 2, "")
        names = dict(zip(labels[0], leading, strict=False)) | dict.fromkeys(set(labels[1]) - set(labels[0]), "d")
        value, dims = _named(labels[1], names, labels[0][-1]), _named(result, names, labels[0][-2])
        if sorted(dims) == sorted(leading + "sd") and _is_right_factor(value):
            return Product(factors[0], factors[1], leading + "sd", value, dims)
    raise Refused("weighs values with an einsum that is no product of matrices")


def _einsum(node: fx.Node) -> tuple[list[Any], list[str], str]:
    """Factors, their labels and the result's; no factors where a label is missing, or twice in one of them."""
    found = einsum_labels(arguments_of(node)["equation"])
    labels, result = found or ([], "")
    is_plain = all(len(set(each)) == len(each) for each in (*labels, result))
    return (factors_of(node), labels, result) if found and is_plain else ([], [], "")


def _named(labels: str, names: dict[str, str], place: str) -> str:
    """The dimensions that have those labels, of which `place` is that along the sequence."""
    return "".join("s" if label == place else names.get(label, "?") for label in labels)


def _is_right_factor(dims: str) -> bool:
    """Whether keys or values have all that they must: heads, or those of a group, may be missing."""
    return "?" not in dims and {"s", "d"} <= set(dims) and dims.count("d") == 1 and bool({"b", "n"} & set(dims))
