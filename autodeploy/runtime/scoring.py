"""Which rows of a step's logits are scored against which tokens, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from autodeploy.errors import OptionError
from autodeploy.runtime.caches import free_memory
from autodeploy.runtime.logprobs import Scores, log_probabilities
from autodeploy.runtime.requests import SamplingParams
from autodeploy.runtime.sampler import NO_TOKEN
from autodeploy.runtime.scheduler import Batch


def check_logprobs(asked: Sequence[tuple[int, SamplingParams]], vocab_size: int | None) -> None:
    """Refuse more of the best tokens than there are, and more than memory holds; `asked` are lengths of prompts."""
    needed = most = 0
    for prompt_len, params in asked:
        counts = {"logprobs": (params.logprobs, params.max_tokens)}
        counts["prompt_logprobs"] = (params.prompt_logprobs, prompt_len - 1)
        for name, (k, size) in counts.items():
            if k is None:
                continue
            if vocab_size is not None and k > vocab_size:
                raise OptionError(
                    f"{name} is {k}, the model has {vocab_size} tokens", fix=f"ask for {vocab_size} at most"
                )
            needed, most = needed + Scores.num_bytes(size, k), max(most, k)
    if needed and needed > (free := free_memory(torch.device("cpu"))):
        raise OptionError(
            f"log probabilities would take {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free",
            where=f"{len(asked)} requests with up to {most} tokens at each place",
            fix="lower logprobs, prompt_logprobs or max_tokens, or ask for fewer prompts at once",
        )


class Scored(NamedTuple):
    """What a step found out of `counts` tokens for each of `scores`, one after another; values as `add` takes them."""

    scores: list[Scores]
    counts: list[int]
    own: np.ndarray
    top: np.ndarray
    top_ids: np.ndarray
    num_bytes: int

    def record(self) -> None:
        """Add everything to the scores of the requests."""
        start = 0
        for scores, count in zip(self.scores, self.counts, strict=True):
            part = slice(start, start + count)
            scores.add(self.own[part], self.top[part], self.top_ids[part])
            start += count


def score(batch: Batch, logits: Tensor, tokens: np.ndarray) -> Scored | None:
    """Log probabilities of the prompt tokens and of the sampled `tokens` [k] of those requests that want them.

    To be called before the batch is committed. A token that is none has none.
    """
    sampled = dict(zip(batch.sampled, tokens.tolist(), strict=True))
    ends, stops = np.cumsum(batch.num_logits), batch.context_lens + batch.query_lens
    scores, counts, rows, targets = [], [], [], []
    for place, request in enumerate(batch.requests):
        if request.num_unscored:
            assert request.prompt_scores is not None
            first = int(stops[place] - batch.num_logits[place])  # the position of its first row of logits
            asked = request.prompt_token_ids[first + 1 : int(stops[place]) + 1]
            begin = int(ends[place] - batch.num_logits[place])
            rows += range(begin, begin + len(asked))
            targets += asked
            scores.append(request.prompt_scores)
            counts.append(len(asked))
        token = sampled.get(request, NO_TOKEN)
        if request.scores is not None and token != NO_TOKEN:
            rows.append(int(ends[place]) - 1)
            targets.append(token)
            scores.append(request.scores)
            counts.append(1)
    if not rows:
        return None
    found = log_probabilities(logits, rows, targets, max(each.k for each in scores))
    return Scored(scores, counts, *found)
