"""Along which dimensions of its first argument an op works, and which ops say so by the shape of their result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

FILLS = {f"{name}{suffix}" for name in ("full", "zeros", "ones", "empty") for suffix in ("", "_like")}
FILLS |= {"new_full", "new_zeros", "new_ones", "new_empty", "scalar_tensor"}
BROADCASTS = {"expand", "expand_as", "broadcast_to", "repeat"}
# Not pointwise, but the shape of the result says all.
RESHAPES = {"view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"}
_VIEWS = RESHAPES | {"squeeze", "unsqueeze", "transpose", "permute", "t", "select", "unbind", "stack"}
_VIEWS |= {"repeat_interleave", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "numpy_T", "view_as_real"}
_COPIES = {"to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "copy", "dropout"}
INDEXING = {"index", "index_select", "gather", "index_put", "scatter", "scatter_add", "index_add", "embedding"}
_JUDGED_BY_SHAPE = FILLS | BROADCASTS | _VIEWS | _COPIES | INDEXING | {"one_hot"}
_CUTS = {"slice", "narrow"}
_NORMS = {"layer_norm", "rms_norm", "native_layer_norm"}
_CONTRACTIONS = {"linear", "matmul", "mm", "bmm", "_grouped_mm", "transformers::grouped_mm_fallback"}
ADDED_CONTRACTIONS = {"addmm", "baddbmm"}
_CONVOLUTIONS = {f"conv{kind}{ndim}d": ndim for kind in ("", "_transpose") for ndim in (1, 2, 3)}
# These treat every other dimension than `dim` or `dims` entry by entry; without one they work along all.
_ALONG_DIM = {
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "logsumexp",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
}
_ALONG_DIM |= {
    "logcumsumexp",
    "sum",
    "mean",
    "prod",
    "amax",
    "amin",
    "max",
    "min",
    "aminmax",
    "argmax",
    "argmin",
    "any",
}
_ALONG_DIM |= {"all", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "count_nonzero", "nansum"}
_ALONG_DIM |= {"nanmean", "median", "nanmedian", "mode", "kthvalue", "quantile", "topk", "sort", "argsort"}
_ALONG_DIM |= {"cat", "concat", "concatenate"}
_ALONG_DIM |= {"split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "flip", "roll"}
_ALONG_DIM |= {"glu", "diff"}
# Pointwise ops, aliases mostly, that torch has not tagged so in every overload.
_UNTAGGED = {"where", "masked_fill", "multiply", "divide", "true_divide", "floor_divide", "subtract", "rsub"}
_UNTAGGED |= {
    "negative",
    "absolute",
    "less",
    "less_equal",
    "greater",
    "greater_equal",
    "not_equal",
    "__and__",
    "__or__",
}
_UNTAGGED |= {"__xor__", "hardswish", "log_sigmoid", "special_expit", "prelu", "polar", "complex"}
INDEX_ARGUMENTS = ("index", "indices", "offs")


def worked_dims(node: fx.Node, source: Tensor, result: Tensor) -> Sequence[int] | None:
    """The dimensions of `source`, its first factor, that `node` does not treat entry by entry; None if not known."""
    name, arguments, ndim = name_of(node), arguments_of(node), source.dim()
    if name == "repeat":
        return [dim - len(arguments["repeats"]) + ndim for dim, times in enumerate(arguments["repeats"]) if times != 1]
    if name in _CUTS:
        dim = arguments["dim"] % ndim
        return () if str(source.shape[dim]) == str(result.shape[dim]) else (dim,)
    flattens = name == "repeat_interleave" and arguments.get("dim") is None and ndim > 1
    if flattens or (name == "dropout" and arguments["p"] and arguments["train"]):
        return None
    if name in _JUDGED_BY_SHAPE | _UNTAGGED or (name in ("max", "min") and "other" in arguments):
        return ()
    if name in _NORMS:
        return range(ndim - len(arguments["normalized_shape"]), ndim)
    if name in _CONTRACTIONS | ADDED_CONTRACTIONS | {"view_as_complex"}:
        return (ndim - 1,)
    if name in ("constant_pad_nd", "pad"):
        return [ndim - 1 - index // 2 for index, amount in enumerate(arguments["pad"]) if amount != 0]
    if name in _CONVOLUTIONS or name == "convolution":
        spatial = _CONVOLUTIONS.get(name) or len(arguments["stride"])
        return range(ndim - spatial - 1, ndim)
    if name in _ALONG_DIM:
        given = arguments.get("dim", arguments.get("dims"))
        given = [given] if isinstance(given, int) else given
        return [dim % ndim for dim in given or range(ndim)] if ndim else ()
    is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return () if is_pointwise else None


def einsum_labels(equation: str) -> tuple[list[str], str] | None:
    """A label for each dimension of each factor, and those of the result; None where they are not all written out."""
    factors, _, result = equation.replace(" ", "").partition("->")
    return None if "." in factors or not result else (factors.split(","), result)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of `node` by name, defaults included; empty where its target has no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    signature = signature_of(node.target)
    return signature.defaults | dict(zip(signature.names, node.args, strict=False)) | node.kwargs


class Signature(NamedTuple):
    """An op's arguments: all in order, those read as numbers or indices, and the defaults of those that have one."""

    names: list[str]
    read: list[str]
    defaults: dict[str, Any]


@cache
def signature_of(op: torch._ops.OpOverload) -> Signature:
    arguments = op._schema.arguments
    kinds = {argument.name: str(argument.type) for argument in arguments}
    return Signature(
        names=list(kinds),
        read=[
            name
            for name, kind in kinds.items()
            if name in INDEX_ARGUMENTS or any(word in kind for word in ("Tensor", "number", "float"))
        ],
        defaults={argument.name: argument.default_value for argument in arguments if argument.has_default_value()},
    )


def name_of(node: fx.Node) -> str:
    """The op's name without overload, in-place ops under their plain name; ATen's alone without their namespace."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    namespace, _, name = node.target._schema.name.partition("::")
    if namespace != "aten":
        return node.target._schema.name
    return name if name.endswith("__") else name.removesuffix("_")
