"""Token ids to text, piece by piece, without ever taking a piece back.

`tokenizers.decoders.DecodeStream` does most of this. Not it, because it raises where bytes of a byte-fallback
vocabulary turn out to be no character, and decodes all tokens since the last text again for each that adds none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so a token can change the text of 3 before it; twice that for tokens of no byte.
_NUM_CONTEXT = 8
_MAX_PENDING = 16


class Tokenizer(Protocol):
    """What we ask of a tokenizer; those of transformers are ones."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Decoder:
    """`decode(ids)`, the text of ids without special tokens as `tokenizer` has it, and what is known of single ids.

    Those of `bytes` are single bytes: a run of them is decoded as a whole, to characters or, where one byte is wrong,
    to as many replacement characters as bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            self.decode = _slow_decode(tokenizer)
            self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
            vocabulary = getattr(tokenizer, "get_vocab", dict)()
            self.bytes = frozenset(vocabulary[name] for name in _BYTE_NAMES if name in vocabulary)
        else:
            # The library's own: transformers' around it takes several times as long.
            self.decode: Callable[[list[int]], str] = self._backend.decode
            added = self._backend.get_added_tokens_decoder()
            self._special = frozenset(token_id for token_id, token in added.items() if token.special)
            self.bytes = frozenset(map(self._backend.token_to_id, _BYTE_NAMES)) - {None}

    def is_silent(self, token_id: int) -> bool:
        """Whether it is a special token, or one that the model has and the tokenizer has not."""
        if token_id in self._special:
            return True
        return self._backend is not None and self._backend.id_to_token(token_id) is None


_BYTE_NAMES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _slow_decode(tokenizer: Any) -> Callable[[list[int]], str]:
    options: dict[str, bool] = {"skip_special_tokens": True}
    # It would remove spaces that have been given out.
    if hasattr(tokenizer, "clean_up_tokenization_spaces"):
        options["clean_up_tokenization_spaces"] = False
    return lambda token_ids: tokenizer.decode(token_ids, **options)


class Detokenizer:
    """Text of one request. The pieces joined are what decoding all its tokens gives, up to the first stop string.

    A piece is held back while it may change: half of a multi-byte character, a run of single bytes, or the beginning of
    a stop string. Each token costs the decoding of a few, whether it adds text or not.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str]) -> None:
        self.stopped = False
        self._decoder = decoder
        self._stop = tuple(stop)
        # Tokens that are decoded together, because a piece can depend on its left neighbour (a space, a character
        # split over tokens). The first _num_context of them, and the first _num_read characters, are in the text.
        self._token_ids: list[int] = []
        self._num_context = self._num_read = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take one more token; returns the text that is now certain. Sets `stopped` once a stop string is complete."""
        if self._decoder.is_silent(token_id):
            return ""
        self._token_ids.append(token_id)
        if token_id in self._decoder.bytes:
            return ""
        decoded = self._decoder.decode(self._token_ids)
        text = decoded[self._num_read :]
        if text and not text.endswith(REPLACEMENT):
            self._go_on_from(self._token_ids[self._num_context :][-_NUM_CONTEXT:], 0)
            return self._release(text)
        if len(self._token_ids) - self._num_context < _MAX_PENDING:
            return ""
        # What is more than a character's bytes away is certain, and so is all but the last character.
        context = self._token_ids[-_NUM_CONTEXT:]
        num_open = len(text[-1:]) if self._decoder.decode(context).endswith(text[-1:]) else 0
        self._go_on_from(context, num_open)
        return self._release(text[: len(text) - num_open])

    def flush(self) -> str:
        """The rest of the text, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(self._token_ids)[self._num_read :])
        text, self._held = text + self._held, ""
        self._token_ids, self._num_context, self._num_read = [], 0, 0
        return text

    def _go_on_from(self, context: list[int], num_open: int) -> None:
        """Have the tokens of `context` count as read, all but their last `num_open` characters."""
        self._token_ids, self._num_context = context, len(context)
        self._num_read = len(self._decoder.decode(context)) - num_open

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
