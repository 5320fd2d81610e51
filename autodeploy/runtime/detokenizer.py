"""Token ids to text, piece by piece, without ever taking a piece back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """What we ask of a tokenizer; those of transformers are ones."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Text of one request. The pieces joined are what decoding all its tokens gives, up to the first stop string.

    A piece is held back while it may change: half of a multi-byte character, or the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        # Tokens from _context on are decoded together, because a piece can depend on its left neighbour (a space, a
        # character split over tokens); those before _read are in the text already.
        self._context = self._read = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take one more token; returns the text that is now certain. Sets `stopped` once a stop string is complete."""
        decoded = self._unread(token_id)
        self._token_ids.append(token_id)
        if not decoded or decoded.endswith(REPLACEMENT):
            return ""
        self._context, self._read = self._read, len(self._token_ids)
        return self._release(decoded)

    def flush(self) -> str:
        """The rest of the text, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._unread())
        text, self._held = text + self._held, ""
        self._context = self._read = len(self._token_ids)
        return text

    def _unread(self, *more: int) -> str:
        known = self._decode(self._token_ids[self._context : self._read])
        return self._decode([*self._token_ids[self._context :], *more])[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        text, self._held = self._held + text, ""
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
