"""What a user asks for, what becomes of it, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from autodeploy.errors import OptionError
from autodeploy.runtime.detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "cancelled"]
NUM_TOKENS, NUM_COMPUTED = 0, 1


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Raises OptionError for a value outside its range.

    temperature 0 is greedy; top_k 0 and top_p 1 keep every token. With `seed` a request's choices repeat, whatever else
    is in the batch; without, the seed is drawn from torch's default generator. `stop` strings end the text, which
    stops before them. `ignore_eos` goes on after an end-of-sequence token.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        _require(_is_finite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer >= 0, 0 for all tokens")
        _require(_is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        valid_seed = self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63)
        _require(valid_seed, "seed", self.seed, "None or an integer in [0, 2**63)")
        _require(all(isinstance(text, str) and text for text in stop), "stop", self.stop, "strings that are not empty")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(valid: bool, name: str, value: object, rule: str) -> None:
    if not valid:
        raise OptionError(f"{name} is {value!r}", where="SamplingParams", fix=f"it must be {rule}")


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class RequestOutput:
    """A request's result: `token_ids` are the generated ones, `text` is theirs ("" without a tokenizer)."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    prompt_token_ids: tuple[int, ...]


@dataclass(eq=False)
class Request:
    """One sequence on its way through the engine; changed by the engine and the scheduler only.

    `tokens` [prompt + max_tokens] int32 holds the prompt and then what was generated. `counts` [2] int64 says how many
    of them there are and how many of those are cached. `row` is its place in the block tables while it runs, else -1;
    while it runs, both arrays are views of the engine's (sequences.py). A last token that ends the sequence is no text.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    tokens: np.ndarray
    counts: np.ndarray
    generator: torch.Generator | None = None
    detokenizer: Detokenizer | None = None
    status: Status = Status.WAITING
    row: int = -1
    finish_reason: FinishReason | None = None
    ends_with_eos: bool = False
    _text: str = ""
    _num_decoded: int = field(init=False)
    _num_taken: int = 0

    def __post_init__(self) -> None:
        self._num_decoded = len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """How many tokens are known, those of the prompt included."""
        return int(self.counts[NUM_TOKENS])

    @property
    def num_computed(self) -> int:
        """How many of the tokens are cached."""
        return int(self.counts[NUM_COMPUTED])

    @num_computed.setter
    def num_computed(self, count: int) -> None:
        self.counts[NUM_COMPUTED] = count

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens generated so far."""
        return tuple(self.tokens[len(self.prompt_token_ids) : self.num_tokens].tolist())

    @property
    def text(self) -> str:
        """The text that is certain by now ("" without a tokenizer), all of it once the request has ended."""
        self._decode()
        return self._text

    def _decode(self) -> None:
        if self.detokenizer is None:
            return
        for token in self.tokens[self._num_decoded : self.num_tokens - self.ends_with_eos].tolist():
            self._text += self.detokenizer.push(token)
            self._num_decoded += 1
        if self.status is Status.FINISHED:
            self._text += self.detokenizer.flush()

    def take_text(self) -> str:
        """The text that has become certain since it was last taken."""
        text = self.text
        taken, self._num_taken = self._num_taken, len(text)
        return text[taken:]

    def is_stopped(self) -> bool:
        """Whether its text has come to a stop string."""
        self._decode()
        return self.detokenizer is not None and self.detokenizer.stopped

    def output(self) -> RequestOutput:
        """The result so far."""
        return RequestOutput(self.token_ids, self.text, self.finish_reason, self.prompt_token_ids)


def as_prompt(token_ids: ArrayLike) -> np.ndarray:
    """`token_ids` as an array; raises OptionError for anything but a non-empty list of token ids."""
    prompt = np.asarray(token_ids)
    if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in "iu":
        raise OptionError(f"a prompt of dtype {prompt.dtype}, shape {prompt.shape}", fix="give a list of token ids")
    if prompt.min() < 0 or prompt.max() >= 2**31:
        raise OptionError(f"a prompt with token ids from {prompt.min()} to {prompt.max()}", fix="give token ids")
    return prompt


def make_request(prompt: np.ndarray, params: SamplingParams, detokenizer: Detokenizer | None) -> Request:
    """A waiting request for a prompt from `as_prompt`."""
    generator = None
    if params.temperature > 0:
        seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
        generator = torch.Generator().manual_seed(seed)
    tokens = np.zeros(len(prompt) + params.max_tokens, dtype=np.int32)
    tokens[: len(prompt)] = prompt
    counts = np.array([len(prompt), 0], dtype=np.int64)
    return Request(tuple(prompt.tolist()), params, tokens, counts, generator, detokenizer)
