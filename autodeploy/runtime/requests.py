"""What a user asks for, what becomes of it, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from traceback import clear_frames
from typing import Any, Literal

import numpy as np
import torch

from autodeploy.errors import AutodeployError, RequestFailed
from autodeploy.options import flag, integer, number, refusal
from autodeploy.runtime.detokenizer import Detokenizer
from autodeploy.runtime.logprobs import Logprobs, Scores

FinishReason = Literal["stop", "length", "cancelled", "error"]
NUM_TOKENS, NUM_COMPUTED = 0, 1
_WHERE = "SamplingParams"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Raises OptionError for a value outside its range.

    temperature 0 is greedy; top_k 0 and top_p 1 keep every token. With `seed` a request's choices repeat, whatever else
    is in the batch; without, the seed is drawn from torch's default generator. `stop` strings end the text, which
    stops before them. `ignore_eos` goes on after an end-of-sequence token.

    `logprobs=k` asks for the log probability of each token of the answer and those of the k best there (0: its own
    alone), `prompt_logprobs=k` for the same of each token of the prompt but the first. They are the model's, before
    temperature, top_k and top_p.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "max_tokens": integer("max_tokens", self.max_tokens, least=1, where=_WHERE),
            "temperature": number("temperature", self.temperature, where=_WHERE),
            "top_k": integer("top_k", self.top_k, least=0, where=_WHERE),
            "top_p": number("top_p", self.top_p, where=_WHERE),
            "stop": _stop_strings(self.stop),
            "ignore_eos": flag("ignore_eos", self.ignore_eos, where=_WHERE),
        }
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                checked[name] = integer(name, count, least=0, end=2**31, where=_WHERE, also="None or ")
        if self.seed is not None:
            checked["seed"] = integer("seed", self.seed, least=0, end=2**63, where=_WHERE, also="None or ")
        if checked["temperature"] < 0:
            raise refusal("temperature", self.temperature, "0 or more", _WHERE)
        if not 0 < checked["top_p"] <= 1:
            raise refusal("top_p", self.top_p, "in (0, 1]", _WHERE)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, tuple | list) or not all(isinstance(text, str) and text for text in texts):
        raise refusal("stop", stop, "a string, or a tuple of strings, none of them empty", _WHERE)
    return tuple(texts)


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class RequestOutput:
    """A request's result: `token_ids` are the generated ones, `text` is theirs ("" without a tokenizer).

    Where `finish_reason` is "error", `error` says why, and the tokens and the text are those before it. `logprobs` are
    those of `token_ids`, and `prompt_logprobs` those of `prompt_token_ids[1:]`; None where nobody asked.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    prompt_token_ids: tuple[int, ...]
    error: AutodeployError | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


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
    error: AutodeployError | None = None
    ends_with_eos: bool = False
    scores: Scores | None = None
    prompt_scores: Scores | None = None
    _pieces: list[str] = field(default_factory=list)
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
    def num_unscored(self) -> int:
        """How many tokens of the prompt still miss the log probabilities that were asked for."""
        return self.prompt_scores.size - self.prompt_scores.count if self.prompt_scores else 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens generated so far."""
        return tuple(self.tokens[len(self.prompt_token_ids) : self.num_tokens].tolist())

    @property
    def text(self) -> str:
        """The text that is certain by now ("" without a tokenizer), all of it once the request has ended."""
        self._decode()
        return "".join(self._pieces)

    def _decode(self) -> None:
        """Text of the tokens that have none yet. Where the tokenizer raises, there is no more, and `error` is set."""
        if self.detokenizer is None:
            return
        try:
            for token in self.tokens[self._num_decoded : self.num_tokens - self.ends_with_eos].tolist():
                self._num_decoded += 1
                if piece := self.detokenizer.push(token):
                    self._pieces.append(piece)
            if self.status is Status.FINISHED and (rest := self.detokenizer.flush()):
                self._pieces.append(rest)
        except Exception as error:  # a tokenizer of the user's may raise anything
            self.detokenizer = None
            self.fail(f"the tokenizer raised {type(error).__name__}: {error}", error)

    def fail(self, what: str, cause: Exception | None = None) -> None:
        """Set `error`, unless there is one already; who calls this has to end the request."""
        if self.error is None:
            where = f"a request of {len(self.prompt_token_ids)} prompt tokens, at token {self.num_tokens}"
            self.error = RequestFailed(what, where=where)
            self.error.__cause__ = cause
            # The lines stay, and what they worked on goes: a result that is kept would keep a step's tensors.
            clear_frames(cause.__traceback__ if cause else None)

    def drop_last_token(self) -> None:
        """Forget the last token, of a request that has ended."""
        self.counts[NUM_TOKENS] -= 1

    def take_text(self) -> str:
        """The text that has become certain since it was last taken."""
        self._decode()
        taken, self._num_taken = self._num_taken, len(self._pieces)
        return "".join(self._pieces[taken:])

    def is_stopped(self) -> bool:
        """Whether its text has come to a stop string."""
        self._decode()
        return self.detokenizer is not None and self.detokenizer.stopped

    def output(self) -> RequestOutput:
        """The result so far."""
        text = self.text  # decoding may raise
        reason = self.finish_reason if self.error is None else "error"
        start, end = len(self.prompt_token_ids), self.num_tokens
        answer = self.scores.of(self.tokens[start:end]) if self.scores else None
        prompt = self.prompt_scores.of(self.tokens[1:start]) if self.prompt_scores else None
        return RequestOutput(self.token_ids, text, reason, self.prompt_token_ids, self.error, answer, prompt)


def make_request(prompt: np.ndarray, params: SamplingParams, detokenizer: Detokenizer | None) -> Request:
    """A waiting request for a prompt from `as_token_ids`."""
    generator = None
    if params.temperature > 0:
        seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
        generator = torch.Generator().manual_seed(seed)
    tokens = np.zeros(len(prompt) + params.max_tokens, dtype=np.int32)
    tokens[: len(prompt)] = prompt
    counts = np.array([len(prompt), 0], dtype=np.int64)
    request = Request(tuple(prompt.tolist()), params, tokens, counts, generator, detokenizer)
    if params.logprobs is not None:
        request.scores = Scores(params.max_tokens, params.logprobs)
    if params.prompt_logprobs is not None:
        request.prompt_scores = Scores(len(prompt) - 1, params.prompt_logprobs)
    return request
