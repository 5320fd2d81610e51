"""The tokens and lengths of all running requests, in arrays by row, so that a step handles all of them at once."""

from __future__ import annotations

import numpy as np

from autodeploy.runtime.requests import NUM_COMPUTED, NUM_TOKENS, Request


class Sequences:
    """`tokens` [N, L] int32 and `counts` [2, N] int64: what running requests know, one row each.

    N = rows, the same as those of the block tables, L = the most tokens of a request. A request that runs has its
    arrays here, one that waits or has ended has its own.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        # The operating system hands memory out as it is touched, so that the unused ends of rows cost nothing.
        self.tokens = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.counts = np.zeros((2, max_num_seqs), dtype=np.int64)
        self.num_tokens, self.num_computed = self.counts[NUM_TOKENS], self.counts[NUM_COMPUTED]

    def enter(self, request: Request, row: int) -> None:
        """Move a request's arrays to `row`."""
        own_tokens, own_counts = request.tokens, request.counts
        request.row, request.tokens = row, self.tokens[row, : len(own_tokens)]
        request.counts = self.counts[:, row]
        request.tokens[:], request.counts[:] = own_tokens, own_counts

    def leave(self, request: Request) -> None:
        """Give a request arrays of its own again."""
        request.row, request.tokens, request.counts = -1, request.tokens.copy(), request.counts.copy()
