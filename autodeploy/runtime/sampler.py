"""Logits to token ids. Shapes: R rows to sample, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autodeploy.runtime.requests import Request

# Of a row whose largest logit is NaN or infinite: no number says which token is the best, and none may be drawn.
NO_TOKEN = -1
_SMALLEST_PART, _LARGEST_PART = 16, 512


def best_tokens(logits: Tensor) -> Tensor:
    """The first of each row's largest logits, or NO_TOKEN: [S, V] -> [S] int64.

    A GPU gives a row to one of its many processors, and few rows leave the others idle: 37 us for 2 rows of 128,256 on
    an H100. So there each row is cut into parts first.
    """
    vocabulary = logits.shape[-1]
    part = min(vocabulary & -vocabulary, _LARGEST_PART)
    if logits.device.type == "cpu" or part < _SMALLEST_PART:
        return _or_none(*logits.max(dim=-1))
    return best_of_parts(logits, part)


def best_of_parts(logits: Tensor, part: int) -> Tensor:
    """The same, from the best of each `part` logits in a row; V is a multiple of `part`."""
    best, place = logits.unflatten(-1, (-1, part)).max(dim=-1)
    best, first = best.max(dim=-1, keepdim=True)
    return _or_none(best, first * part + place.gather(1, first)).squeeze(1)


def _or_none(best: Tensor, token: Tensor) -> Tensor:
    """NO_TOKEN in place of `token` where the largest logit is NaN, which is larger than all numbers, or infinite."""
    return torch.where(best.abs() < torch.inf, token, NO_TOKEN)


def sample_tokens(logits: Tensor, rows: Sequence[int], requests: Sequence[Request]) -> tuple[Tensor, int]:
    """The next tokens [R] int64 of `requests`, none of them greedy, whose logits are `rows` of `logits` [S, V].

    A request's random number comes from its own generator, so its choice does not depend on the rest of the batch.
    NO_TOKEN where `best_tokens` gives it. Also returns the bytes copied to the device.
    """
    drawn = zip(rows, requests, strict=True)
    settings_R5 = torch.tensor([_settings(row, r, logits.shape[-1]) for row, r in drawn], dtype=torch.float64)
    row_R, *columns = settings_R5.to(logits.device).unbind(1)
    filtered = any(request.params.top_k or request.params.top_p < 1 for request in requests)
    return _sample(logits[row_R.long()], *columns, filtered=filtered), settings_R5.nbytes


def _settings(row: int, request: Request, vocabulary: int) -> tuple[float, ...]:
    """row, temperature, top_k, top_p, and a random number in [0, 1)."""
    params = request.params
    uniform = torch.rand((), generator=request.generator, dtype=torch.float64).item()
    return row, params.temperature, params.top_k or vocabulary, params.top_p, uniform


def _sample(
    logits_RV: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor, *, filtered: bool
) -> Tensor:
    """One token per row [R] int64, by inverting the distribution function in vocabulary order."""
    logits_RV = logits_RV.double()
    best_R1 = logits_RV.amax(dim=-1, keepdim=True)
    # The best score is 0, so that no temperature, however low, overflows.
    scores_RV = (logits_RV - best_R1) / temperature[:, None]
    if filtered:
        threshold_R1 = _lowest_kept(scores_RV, top_k[:, None], top_p[:, None])
        scores_RV = scores_RV.masked_fill(scores_RV < threshold_R1, -torch.inf)
    cumulative_RV = torch.softmax(scores_RV, dim=-1).cumsum(dim=-1)
    total_R1 = cumulative_RV[:, -1:]
    token_R1 = torch.searchsorted(cumulative_RV, uniform[:, None] * total_R1, right=True)
    # Rounding may carry the product up to the total, past the last token that has any probability.
    last_R1 = torch.searchsorted(cumulative_RV, total_R1.contiguous())
    return _or_none(best_R1, torch.minimum(token_R1, last_R1)).squeeze(1)


def _lowest_kept(scores_RV: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """The smallest score kept [R, 1]: of the top_k best, the fewest whose probabilities add up to top_p; ties stay."""
    sorted_RV = scores_RV.sort(dim=-1, descending=True).values
    rank_V = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    best_RV = rank_V < top_k_R1
    probability_RV = torch.softmax(sorted_RV.masked_fill(~best_RV, -torch.inf), dim=-1)
    before_RV = probability_RV.cumsum(dim=-1) - probability_RV
    # top_p = 1 keeps all, also where rounding lets the sum reach 1 before the end.
    kept_RV = best_RV & ((before_RV < top_p_R1) | (top_p_R1 >= 1))
    # The best is always kept, but NaN compares as if it were not.
    return sorted_RV.gather(1, kept_RV.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
