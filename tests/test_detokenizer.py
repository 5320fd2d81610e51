"""Streaming text: pieces joined are the whole text, and nothing is ever taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodeploy.runtime.detokenizer import Decoder, Detokenizer

SPECIAL = 256


class ByteTokenizer:
    """Token ids are UTF-8 bytes, so most characters take several tokens; 256 is a special token."""

    all_special_ids = (SPECIAL,)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token for token in token_ids if token != SPECIAL).decode("utf-8", errors="replace")


def stream(token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(Decoder(ByteTokenizer()), stop)
    pieces = []
    for token in token_ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.flush()], detokenizer


@given(st.text(), st.lists(st.integers(0, 20), max_size=3))
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str, specials: list[int]) -> None:
    token_ids = list(text.encode())
    for place in specials:
        token_ids.insert(place, SPECIAL)
    pieces, _ = stream(token_ids)
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


@given(st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, detokenizer = stream(list(text.encode()), tuple(stop))
    ends = [size for size in range(len(text) + 1) if any(text[:size].endswith(end) for end in stop)]
    seen = text[: ends[0]] if ends else text
    cut = min((seen.find(end) for end in stop if end in seen), default=len(seen))
    assert "".join(pieces) == seen[:cut]
    assert detokenizer.stopped == bool(ends)


def test_the_beginning_of_a_stop_string_is_held_until_it_is_none() -> None:
    pieces, _ = stream(list(b"x<ex<end"), ("<end>",))
    assert pieces == ["x", "", "", "<ex", "", "", "", "", "<end"]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    assert stream([0x61, 0xC3])[0] == ["a", "", "�"]


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_an_invalid_byte_does_not_stop_the_stream(stop: tuple[str, ...]) -> None:
    pieces, _ = stream([0x61, 0xFF, 0x62, 0x63], stop)
    assert pieces == ["a", "", "�b", "c", ""]
