"""Log probabilities of tokens: how they are computed, kept while a request runs, and given to whoever asked.

They are those of the model itself, log_softmax of its logits in float32, before temperature, top_k and top_p.

Shapes: R rows of logits, V vocabulary, N tokens, k best tokens of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor


class TokenLogprob(NamedTuple):
    """A token with its own log probability, and the k tokens that were most probable there, the best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Logprobs(Sequence[TokenLogprob]):
    """A sequence of `TokenLogprob`, kept as arrays: `token_ids` [N] and `top_ids` [N, k] int32, `own` [N] and `top`
    [N, k] float32."""

    token_ids: np.ndarray
    own: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    @overload
    def __getitem__(self, index: int) -> TokenLogprob: ...

    @overload
    def __getitem__(self, index: slice) -> Logprobs: ...

    def __getitem__(self, index: int | slice) -> TokenLogprob | Logprobs:
        token, own, ids, top = self.token_ids[index], self.own[index], self.top_ids[index], self.top[index]
        if isinstance(index, slice):
            return Logprobs(token, own, ids, top)
        return TokenLogprob(int(token), float(own), tuple(zip(ids.tolist(), top.tolist(), strict=True)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Logprobs) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Logprobs of {len(self)} tokens, sum {self.own.sum():.4g}, with the {self.top.shape[1]} best of each"


class Scores:
    """Room for the log probabilities of up to `size` tokens with the `k` best of each; the first `count` are known."""

    def __init__(self, size: int, k: int) -> None:
        # The operating system hands memory out as it is touched.
        self.k, self.count, self.size = k, 0, size
        self._own, self._top = np.empty(size, dtype=np.float32), np.empty((size, k), dtype=np.float32)
        self._top_ids = np.empty((size, k), dtype=np.int32)

    @staticmethod
    def num_bytes(size: int, k: int) -> int:
        """What they take, with the copy that goes out."""
        return 2 * size * (4 + 8 * k)

    def add(self, own: np.ndarray, top: np.ndarray, top_ids: np.ndarray) -> None:
        """Those of the next tokens, with `k` best or more."""
        end = self.count + len(own)
        self._own[self.count : end] = own
        self._top[self.count : end], self._top_ids[self.count : end] = top[:, : self.k], top_ids[:, : self.k]
        self.count = end

    def of(self, token_ids: np.ndarray) -> Logprobs:
        """A copy of what is known of `token_ids`."""
        count = min(self.count, len(token_ids))
        parts = (token_ids[:count], self._own[:count], self._top_ids[:count], self._top[:count])
        return Logprobs(*(part.copy() for part in parts))


def log_probabilities(
    logits: Tensor, rows: Sequence[int], tokens: Sequence[int], k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of `rows` [R] of `logits` [S, V]: those of `tokens` [R] [R], the k best [R, k] float32, and these tokens [R, k].

    Also returns the bytes copied to the device.
    """
    index_2R = torch.tensor([rows, tokens], dtype=torch.int64)
    row_R, token_R = index_2R.to(logits.device)
    found_RV = torch.log_softmax(logits[row_R].float(), dim=-1)
    own_R1, top_Rk = found_RV.gather(1, token_R[:, None]), found_RV.topk(k, dim=-1)
    values = torch.cat([own_R1, top_Rk.values], dim=1).cpu().numpy()
    return values[:, 0], values[:, 1:], top_Rk.indices.cpu().numpy(), index_2R.nbytes
