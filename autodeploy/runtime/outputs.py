"""What steps give, and how much work they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from autodeploy.runtime.requests import Request, Status


class StepOutput(NamedTuple):
    """What one step gave to one request; `text` is what has become certain since it was last asked for."""

    request: Request
    token_id: int
    text: str
    finished: bool


@dataclass
class StepOutputs:
    """What one step gave: `token_ids` [k] int64 to `requests`.

    Iterating over it asks each request for its text, which takes longer than all the rest.
    """

    requests: Sequence[Request] = ()
    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[StepOutput]:
        for request, token in zip(self.requests, self.token_ids.tolist(), strict=True):
            yield StepOutput(request, token, request.take_text(), request.status is Status.FINISHED)


@dataclass
class EngineStats:
    """Totals since the engine was made; over `num_steps` they are averages per step.

    `host_seconds` is the time around the compiled step and the sampling: scheduling, packing, starting the copy,
    bookkeeping. Host-to-device copies are one per step, one more where a request is not greedy, and one where there are
    log probabilities. Steps that raised count as `num_failed_steps` alone.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_host_to_device_copies: int = 0
    host_to_device_bytes: int = 0
    host_seconds: float = 0.0
    num_failed_steps: int = 0
