"""Which biases are ALiBi (Press et al., arXiv 2108.12409): one slope per head times the distance from query to key."""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.attention_forms.asked import Masks, Seen
from autodeploy.attention_forms.evaluate import cone
from autodeploy.attention_forms.found import to_four
from autodeploy.attention_forms.scores import Term

_NUM_ROWS = 64  # of a matrix larger than this, queries to compare
_ROUNDINGS = 4  # of the largest value: product, shift, their difference, and the slope that was read from them
_ROUNDED = (torch.float16, torch.bfloat16)


def read_slopes(masks: Masks, term: Term, num_heads: int, seen: Seen, *, has_sinks: bool) -> Tensor | None:
    """[H] float32 if `term`, which is known, adds slope · (j - i) to what query i sees of key j; else None.

    Without sinks it may add anything more that is the same for all keys of a query: a softmax does not see it.
    """
    # In 16 bits distances are rounded, but only at lengths beyond those that are asked.
    if term.role != "add" or any(getattr(node.meta.get("val"), "dtype", None) in _ROUNDED for node in cone(term.node)):
        return None
    slopes_H11 = None
    for length, value in reversed(list(masks.values(term))):
        row_R = torch.linspace(0, length - 1, min(length, _NUM_ROWS), device=value.device).round().long()
        # Cut out of a table that is shorter: the graph itself does not run at this length.
        if any(size not in (1, length) for size in value.shape[-2:]):
            continue
        seen_RS = seen.matrix(length, value.device)[row_R]
        distance_RS = torch.arange(length, device=value.device) - row_R[:, None]
        four = to_four(value, term, num_heads)
        added_BHSS = torch.broadcast_to(four, torch.broadcast_shapes(four.shape, (1, num_heads, length, length)))
        added_BHRS = torch.where(seen_RS, added_BHSS[:, :, row_R].double() * term.factor, 0)
        bound_H11 = _ROUNDINGS * torch.finfo(torch.float32).eps * added_BHRS.abs().amax((0, 2, 3))[:, None, None]
        if not has_sinks:
            added_BHRS = added_BHRS - (added_BHRS * (distance_RS == 0)).sum(-1, keepdim=True)
        if slopes_H11 is None:
            farthest = int(distance_RS[-1][seen_RS[-1]].min())
            slopes_H11 = added_BHRS[0, :, -1, length - 1 + farthest, None, None] / farthest
        error_BHRS = (added_BHRS - slopes_H11 * distance_RS) * seen_RS
        if not bool((error_BHRS.abs() <= bound_H11).all()):
            return None
    return None if slopes_H11 is None else slopes_H11.flatten().float()
