"""What a layer may see, read off the mask function that transformers hands to its mask interface.

The function is the truth: sliding windows and the like are closures over it, and keyword arguments such as
`sliding_window` are hints for kernels that build no mask. So it is asked, on plain index vectors, and the answer is
checked against the closed form that the canonical op can carry.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from autodeploy.attention_forms.asked import Seen, read_form
from autodeploy.attention_forms.evaluate import Refused, learn
from autodeploy.attention_forms.places import Values
from autodeploy.attention_forms.square import Square
from autodeploy.attention_forms.unfold import unfolder
from autodeploy.graph.edit import get_attribute
from autodeploy.graph.meta import VALUE
from autodeploy.metadata.span import Full, Span

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_QUERIES, _KEYS = 5, 7  # any two sizes above one that differ


@dataclass(frozen=True)
class Mask:
    """What a query sees: `causal` and `span` as in the canonical op.

    `refused` says why the mask has no such form; the other fields mean nothing then. `is_asked` tells that it has been
    asked; what depends on tensors of the batch cannot be.
    """

    causal: bool = True
    span: Span = field(default_factory=Full)
    refused: str | None = None
    is_asked: bool = True


def read_mask(mask_function: MaskFunction, num_positions: int) -> Mask:
    """Causality and span of `mask_function` over positions 0 .. num_positions - 1; usable inside an export."""
    name = _describe(mask_function)
    fake_mode = detect_fake_mode()
    # Asking a function that reads the batch creates symbols for the answers; nothing will ever use them.
    symbols = (
        fake_mode.shape_env.ignore_fresh_unbacked_symbols() if fake_mode and fake_mode.shape_env else nullcontext()
    )
    with symbols, unset_fake_temporarily(), disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        try:
            form = _read_form(_traced(mask_function), num_positions)
        except Refused as refused:
            return Mask(refused=f"mask {name}, which {refused}", is_asked=False)
        except Exception as error:  # the function is foreign code that may read tensors of the batch
            reason = f"mask {name} depends on more than positions ({type(error).__name__})"
            return Mask(refused=reason, is_asked=False)
    if form is None:
        return Mask(refused=f"mask {name} is neither causal, full, a sliding window nor chunks")
    return Mask(form.causal, form.span)


def _traced(mask_function: MaskFunction) -> fx.GraphModule:
    """The graph of `mask_function`; the indices it takes are [1, 1] for batch and head, [Q, 1] and [1, K]."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    queries, keys = torch.arange(_QUERIES)[:, None], torch.arange(_KEYS)[None, :]
    return make_fx(mask_function, tracing_mode="fake", _allow_non_fake_inputs=True)(zero, zero, queries, keys)


def _read_form(gm: fx.GraphModule, num_positions: int) -> Seen | None:
    """Raises Refused where the function cannot be asked for every pair of positions."""
    values = Values()
    places = (values.place("batch"), values.place("head"), values.query, values.key)
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), places, strict=True))
    for node in gm.graph.find_nodes(op="get_attr"):
        VALUE.set(node, get_attribute(gm, str(node.target)))
    unfold = unfolder(gm, learn(gm, inputs).known, values, None, num_positions, inputs=inputs)
    (result,) = gm.graph.output_node().all_input_nodes
    square = Square(values, num_positions)
    seen = unfold(result, (values.query, values.key))
    if square.end_of(seen) < num_positions:
        raise Refused("reads a tensor that is shorter than the model's largest position")
    return read_form(square, values, seen)


def _describe(mask_function: Callable[..., object]) -> str:
    """Names of the function and of those it closes over: "and_masks(sliding_window_overlay, causal_mask_function)"."""
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".")[0]
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    inner = [part for cell in cells for part in (cell if isinstance(cell, tuple) else (cell,)) if callable(part)]
    return f"{name}({', '.join(_describe(part) for part in inner)})" if inner else name
