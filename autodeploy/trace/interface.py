"""Our entries in transformers' attention and mask interfaces: what a layer asks for becomes one canonical node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autodeploy.attention_forms.asked import LARGEST
from autodeploy.errors import UnsupportedFeature
from autodeploy.ops.kinds.attention import attend, attention
from autodeploy.trace.mask import Mask, MaskFunction, read_mask

IMPLEMENTATION = "autodeploy_trace"
_MASK_ATTRIBUTE = "_autodeploy_mask"
# Tensors that some layers pass on for other kernels, and that the mask or the canonical op already accounts for.
_REDUNDANT_TENSORS = frozenset({"position_ids"})


@contextmanager
def registered(model: nn.Module) -> Iterator[None]:
    """While open, the implementation name IMPLEMENTATION exists and reports errors with module paths of `model`."""
    paths = {id(module): path for path, module in model.named_modules()}

    def attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        where = paths.get(id(module)) or type(module).__name__
        return _attention(where, *args, **kwargs), None

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[IMPLEMENTATION]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[IMPLEMENTATION]


def _mask(
    *, mask_function: MaskFunction, attention_mask: Tensor | None = None, config: Any = None, **kwargs: Any
) -> Tensor:
    """Eager attention's mask, which some layers read or change, and beside it what `mask_function` lets a query see.

    Where all layers pass it on untouched, nothing uses it in the end.
    """
    kwargs["allow_is_bidirectional_skip"] = False
    mask = eager_mask(mask_function=mask_function, attention_mask=attention_mask, config=config, **kwargs)
    if attention_mask is None:
        num_positions = getattr(config, "max_position_embeddings", None) or LARGEST
        setattr(mask, _MASK_ATTRIBUTE, read_mask(mask_function, num_positions))
    return mask


def _attention(
    where: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One `autodeploy::attention` node: query [B, H, S, D], key [B, K, S, D], value [B, K, S, E] -> [B, S, H, E].

    `dropout` is ignored as eager attention does outside training, `sliding_window` and `is_causal` because eager
    attention obeys the mask alone. `indices` [B, S, X] are the keys that an indexer chose for each query.
    """
    unknown = [name for name, arg in kwargs.items() if isinstance(arg, Tensor) and name not in _REDUNDANT_TENSORS]
    if unknown:
        raise UnsupportedFeature(f"attention with an extra tensor argument {unknown[0]!r}", where=where)
    if not statically_known_true(query.shape[2] == key.shape[2]):
        raise UnsupportedFeature("attention whose keys are not this sequence's own tokens", where=where)
    if scaling is not None and not isinstance(scaling, (int, float)):
        raise UnsupportedFeature("attention with a scale that is not a number", where=where)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    mask = _mask_of(attention_mask, where)
    if mask is None:
        if indices is not None:
            raise UnsupportedFeature("sparse attention with a mask that depends on data", where=where)
        assert attention_mask is not None
        bias = attention_mask if position_bias is None else attention_mask + position_bias
        return attend(query, key, value, None, scale=scale, softcap=softcap, sinks=s_aux, bias=bias).transpose(1, 2)
    return attention(
        query,
        key,
        value,
        s_aux,
        position_bias,
        chosen=indices,
        scale=scale,
        causal=mask.causal,
        span=mask.span.name,
        softcap=softcap,
    )


def _mask_of(attention_mask: Tensor | None, where: str) -> Mask | None:
    """What the mask of transformers' interface shows; None for one that the model made or changed itself.

    A mask that depends on tensors of the model is of that sort: they are nodes of the graph, which the forms can ask.
    """
    if attention_mask is None:
        raise UnsupportedFeature("attention without a mask, which eager attention runs over all tokens", where=where)
    mask = getattr(_whole(attention_mask), _MASK_ATTRIBUTE, None)
    if mask is None or not mask.is_asked:
        return None
    if mask.refused:
        raise UnsupportedFeature(f"attention with {mask.refused}", where=where)
    return mask


def _whole(tensor: Tensor) -> Tensor:
    """The tensor that `tensor` is an identical view of (some layers slice a mask to the length it has), or itself."""
    base = tensor._base
    if base is None or not statically_known_true(sym_eq(base.shape, tensor.shape)):
        return tensor
    return base if statically_known_true(sym_eq(base.stride(), tensor.stride())) else tensor
