"""The layout: what the host says about a ragged batch, and nothing that can be derived from it.

One int32 row per sequence, so that the whole batch is one rectangular tensor and one host-to-device copy:

    layout_SC = [ query_len | context_len | state_slot | num_logits | block table of group 0 (P) | ... of G-1 (P) ]

S = sequences (rows beyond the real ones are padding), C = 4 + G * P, G = KV groups, P = pages per sequence.
A padding row is all zeros: no tokens, scratch page 0, scratch state slot 0.

`num_logits` says of how many of a sequence's last new tokens logits are wanted: 1 to sample the next token, none within
a prompt, more to score a prompt or to verify a draft. The step gives S rows of logits, those that are wanted in front,
so that S is at least their number: a batch that wants more logits than it has sequences has rows of padding for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from autodeploy.metadata.span import Span

IntOrArray = TypeVar("IntOrArray", int, np.ndarray)

QUERY_LEN, CONTEXT_LEN, STATE_SLOT, NUM_LOGITS, NUM_FIXED_COLUMNS = 0, 1, 2, 3, 4
SCRATCH_PAGE = 0
SCRATCH_STATE = 0
# The sizes of a step, by name, with what they are taken to be where a number is needed: distinct, so that no two can be
# mistaken for one another, and typical of a small step.
SIZES = (("T", 34), ("S", 33), ("GP", 36))
POOL_HINT = 61  # pages of a group, state slots


@dataclass(frozen=True)
class LayoutSpec:
    """What a compiled graph fixes about its layouts.

    `num_groups` KV groups (each with its own block table), `page_size` tokens per page.
    `spans[g]` is what tokens see in group g.
    `has_state` tells whether any node keeps a per-sequence state (convolution, SSM).
    """

    page_size: int
    spans: tuple[Span, ...]
    has_state: bool = False

    @property
    def num_groups(self) -> int:
        return len(self.spans)

    def num_columns(self, pages_per_sequence: int) -> int:
        return NUM_FIXED_COLUMNS + self.num_groups * pages_per_sequence

    def first_read_page(self, group: int, context_len: IntOrArray) -> IntOrArray:
        """First block-table entry that a sequence with `context_len` cached tokens still reads; may be negative.

        The first new token stands at position c, and sees what the field `first_seen` says.
        """
        return self.spans[group].first_seen(context_len) // self.page_size
