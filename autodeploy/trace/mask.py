"""What a layer may see, read off the mask function that transformers hands to its mask interface.

The function is the truth: sliding windows and the like are closures over it, and keyword arguments such as
`sliding_window` are hints for kernels that build no mask. So it is asked, on plain index vectors, and the answer is
checked against the closed form that the canonical op can carry.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_NUM_RANDOM_PAIRS = 4096


@dataclass(frozen=True)
class Mask:
    """A query at position i sees keys j <= i if `causal`, and only |i - j| < `window` if there is one.

    `refused` says why the mask has no such form; the other fields mean nothing then.
    """

    causal: bool = True
    window: int | None = None
    refused: str | None = None


@torch.library.custom_op("autodeploy::mask_marker", mutates_args=())
def mask_marker(batch: int, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A stand-in for the mask [batch, 1, num_queries, num_keys] that layers pass on untouched to their attention."""
    return torch.zeros(batch, 1, num_queries, num_keys, dtype=dtype, device=device)


@mask_marker.register_fake
def _(batch, num_queries, num_keys, dtype, device):
    return torch.empty(batch, 1, num_queries, num_keys, dtype=dtype, device=device)


def read_mask(mask_function: MaskFunction, num_positions: int) -> Mask:
    """Causality and window of `mask_function` over positions 0 .. num_positions - 1; usable inside an export."""
    name = _describe(mask_function)
    fake_mode = detect_fake_mode()
    # Asking a function that reads the batch creates symbols for the answers; nothing will ever use them.
    symbols = (
        fake_mode.shape_env.ignore_fresh_unbacked_symbols() if fake_mode and fake_mode.shape_env else nullcontext()
    )
    with symbols, unset_fake_temporarily(), disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        try:
            return _probe(mask_function, num_positions, name)
        except Exception as error:  # the function is foreign code that may read tensors of the batch
            return Mask(refused=f"mask {name} depends on more than positions ({type(error).__name__})")


def _probe(mask_function: MaskFunction, num_positions: int, name: str) -> Mask:
    last = num_positions - 1
    distance = torch.arange(num_positions)
    behind = _ask(mask_function, torch.full_like(distance, last), last - distance)
    ahead = _ask(mask_function, torch.zeros_like(distance), distance)
    num_seen = int(behind.sum())
    mask = Mask(causal=not bool(ahead[1:].any()), window=None if num_seen == num_positions else num_seen)
    queries, keys = _pairs(num_positions, num_seen)
    answers = torch.cat([behind, ahead, _ask(mask_function, queries, keys)])
    if not torch.equal(answers, _closed_form(mask, torch.cat([distance, -distance, queries - keys]))):
        return Mask(refused=f"mask {name} is neither causal, full nor a sliding window")
    return mask


def _ask(mask_function: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    zeros = torch.zeros_like(queries)
    return mask_function(zeros, zeros, queries, keys).expand(queries.shape)


def _closed_form(mask: Mask, distance: Tensor) -> Tensor:
    seen = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        seen = distance >= 0
    return seen if mask.window is None else seen & (distance.abs() < mask.window)


def _pairs(num_positions: int, num_seen: int) -> tuple[Tensor, Tensor]:
    """Random (query, key) positions: half anywhere, half around the edge of the window."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randint(num_positions, (2, _NUM_RANDOM_PAIRS), generator=generator)
    near = queries - torch.randint(-2 * num_seen - 2, 2 * num_seen + 2, (_NUM_RANDOM_PAIRS,), generator=generator)
    near = near.clamp(0, num_positions - 1)
    return torch.cat([queries, queries]), torch.cat([keys, near])


def _describe(mask_function: Callable[..., object]) -> str:
    """Names of the function and of those it closes over: "and_masks(sliding_window_overlay, causal_mask_function)"."""
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".")[0]
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    inner = [part for cell in cells for part in (cell if isinstance(cell, tuple) else (cell,)) if callable(part)]
    return f"{name}({', '.join(_describe(part) for part in inner)})" if inner else name
