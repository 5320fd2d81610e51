"""A model in plain Python whose every token depends on all that it reads back from its caches, and engines for it."""

from __future__ import annotations

import torch
from spans import FULL, first
from torch import Tensor

from autodeploy.metadata.layout import CONTEXT_LEN, NUM_FIXED_COLUMNS, NUM_LOGITS, QUERY_LEN, STATE_SLOT, LayoutSpec
from autodeploy.metadata.span import Span, Window
from autodeploy.ops.cache import Paged, State
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.requests import RequestOutput, SamplingParams

VOCABULARY = 50
# Tokens that it never generates: of the first, a step with it raises; of the others, the logits behind are no numbers.
RAISES, NAN, MINUS_INFINITY, INFINITY = range(VOCABULARY, VOCABULARY + 4)
EMBEDDING = VOCABULARY + 4
MAX_MODEL_LEN = 64


class StepFailed(Exception):
    """What the model raises, after it has written its caches."""


def mix(values: list[int], start: int = 1) -> int:
    """An order-dependent hash that fits int32."""
    for value in values:
        start = (start * 31 + value + 1) % 65521
    return start


WINDOW = Window(6)


class HashModel:
    """Two layers and a state: the first layer hashes the token ids that its span shows, the second everything the
    first wrote, the state is a running hash; the next token is the hash of the last two.

    Group 0 pages full attention, group 1 the span.
    """

    def __init__(self, page_size: int, span: Span = WINDOW) -> None:
        self.span = span
        self.spec = LayoutSpec(page_size, (FULL, span), has_state=True)
        self.cache_specs = (
            Paged("tokens", (1,), torch.int32, group=1),
            Paged("hidden", (1,), torch.int32),
            State("state", (1,), torch.int32),
        )
        self.sizes: list[tuple[int, int]] = []
        self.fail_at = -1

    def expected(self, prompt: list[int], count: int) -> tuple[int, ...]:
        """The tokens it generates, computed on a plain list."""
        tokens = list(prompt)
        for _ in range(count):
            hidden = [mix(tokens[first(self.span, i) : i + 1]) for i in range(len(tokens))]
            tokens.append(mix([mix(hidden), mix(tokens)]) % VOCABULARY)
        return tuple(tokens[len(prompt) :])

    def __call__(self, input_ids: Tensor, layout: Tensor, tokens: Tensor, hidden: Tensor, state: Tensor) -> Tensor:
        assert input_ids.dtype is layout.dtype is torch.int32
        self.sizes.append((len(input_ids), len(layout)))
        logits = torch.zeros(len(layout), VOCABULARY)
        stream, start, place = input_ids.tolist(), 0, 0
        for row in layout.tolist():
            new = stream[start : start + row[QUERY_LEN]]
            start += row[QUERY_LEN]
            if new:
                best = self._advance(row, new, tokens.view(-1), hidden.view(-1), state.view(-1))
                for index in range(len(new) - row[NUM_LOGITS], len(new)):
                    logits[place, best[index]] = 1
                    self._spoil(logits[place], new[index])
                    place += 1
        if len(self.sizes) == self.fail_at or RAISES in stream:
            raise StepFailed("no such row")
        return logits

    def _spoil(self, logits: Tensor, token: int) -> None:
        if token == NAN:
            logits[7] = torch.nan
        elif token in (MINUS_INFINITY, INFINITY):
            logits[:] = -torch.inf if token == MINUS_INFINITY else torch.inf

    def _advance(self, row: list[int], new: list[int], tokens: Tensor, hidden: Tensor, state: Tensor) -> list[int]:
        """The best token behind each new one."""
        pages = (len(row) - NUM_FIXED_COLUMNS) // 2
        full, sliding = row[NUM_FIXED_COLUMNS:][:pages], row[NUM_FIXED_COLUMNS:][pages:]
        cached, slot = row[CONTEXT_LEN], row[STATE_SLOT]
        states = [mix(new[: count + 1], int(state[slot]) if cached else 1) for count in range(len(new))]
        state[slot] = states[-1]
        for position, token in enumerate(new, cached):
            tokens[self._slots(sliding, position, position + 1)] = token
        for position in range(cached, cached + len(new)):
            seen = tokens[self._slots(sliding, first(self.span, position), position + 1)]
            hidden[self._slots(full, position, position + 1)] = mix(seen.tolist())
        everything = hidden[self._slots(full, 0, cached + len(new))].tolist()
        return [
            mix([mix(everything[: cached + count]), each]) % VOCABULARY for count, each in enumerate(states, start=1)
        ]

    def _slots(self, table: list[int], first: int, end: int) -> list[int]:
        size = self.spec.page_size
        pages = [table[position // size] for position in range(first, end)]
        assert all(pages), "a position without a page is read or written"
        return [page * size + position % size for position, page in zip(range(first, end), pages, strict=True)]


class LetterTokenizer:
    """Token 3 is "d", and so on."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + token % 26) for token in token_ids)


def make_engine(model: HashModel, **options: object) -> Engine:
    settings = {"device": torch.device("cpu"), "num_pages": (40, 40), "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4}
    settings["vocab_size"] = EMBEDDING
    return Engine(model, model.cache_specs, model.spec, **(settings | options))  # type: ignore[arg-type]


def run(engine: Engine, limit: int = 2000) -> None:
    for _ in range(limit):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def assert_nothing_owned(engine: Engine) -> None:
    assert not engine._tables.tables.any()
    assert len(engine._tables.free_rows) == engine._tables.tables.shape[1]


def generate(engine: Engine, prompts: list[list[int]], max_tokens: list[int]) -> list[RequestOutput]:
    requests = engine.add_many(prompts, [SamplingParams(max_tokens=count) for count in max_tokens])
    run(engine)
    assert_nothing_owned(engine)
    return [request.output() for request in requests]
