"""Streaming text: pieces joined are the whole text, and nothing is ever taken back."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from autodeploy.app.demo import demo_model
from autodeploy.errors import DownloadError
from autodeploy.options import from_environment
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


TEXT = "The cat é 中文字 sat 🙂🙃 on the mat, naïve façade. Ωμέγα 한국어 \ufffd the end\n" * 3


def byte_level() -> Any:
    """As GPT-2, Llama 3, Qwen and SmolLM2 have it: every byte is a letter of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback() -> Any:
    """As Llama 2, Mistral and Gemma have it: words, and <0x00> to <0xFF> for what is none."""
    words = ["▁", "▁the", "▁cat", "a", "b", "▁é", "ing", "�", "▁▁", "\n"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.Unigram([(name, -2.0) for name in names], 0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_pieces() -> Any:
    names = ["[UNK]", "the", "cat", "##s", "##ing", ".", "'", "t", "n", "é", "�"]
    tokenizer = Tokenizer(models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def smollm2() -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(demo_model(from_environment().cache_dir, print))
    except DownloadError as error:
        pytest.skip(f"the demo model cannot be had: {error.what}")


TOKENIZERS = [byte_level, byte_fallback, word_pieces, ByT5Tokenizer, smollm2]


def pieces_of(tokenizer: Any, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(Decoder(tokenizer), ())
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


def some_ids(tokenizer: Any, random: Random) -> list[int]:
    """Random ones: any, those that are bytes or parts of characters, those of a text, and long runs of one."""
    size = len(tokenizer)
    ids: list[int] = []
    while len(ids) < 150:
        sort = random.randrange(5)
        if sort == 0:
            ids += [random.randrange(size) for _ in range(20)]
        elif sort == 1:
            ids += [random.randrange(min(size, 400)) for _ in range(20)]
        elif sort == 2:
            start = random.randrange(len(TEXT))
            ids += tokenizer(TEXT[start : start + 30]).input_ids
        elif sort == 3:
            ids += [random.randrange(min(size, 300))] * random.randrange(60)
        else:
            ids += tokenizer.all_special_ids[: random.randrange(3)] * random.randrange(1, 30)
    return ids


@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_join_to_what_decoding_all_gives(make: Callable[[], Any]) -> None:
    tokenizer, random = make(), Random(0)
    for _ in range(60):
        ids = some_ids(tokenizer, random)
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces_of(tokenizer, ids)) == whole


@pytest.mark.parametrize("make", [byte_level, smollm2])
def test_ids_that_the_tokenizer_has_not_are_no_text(make: Callable[[], Any]) -> None:
    """Embeddings have more rows than the tokenizer has tokens."""
    tokenizer = make()
    beyond = [len(tokenizer) + index for index in range(30)]
    first, *rest = tokenizer("é").input_ids or [5]
    ids = [first, *beyond, *rest, *beyond, *tokenizer(" end").input_ids]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_replacement_character_of_the_text_itself_is_kept() -> None:
    """ByT5 has no text for bytes that are no character, and here more of them follow than are decoded together."""
    tokenizer = ByT5Tokenizer()
    ids = [byte + 3 for byte in "\ufffd".encode() + b"\x9f" * 40 + b"a"]
    assert "".join(pieces_of(tokenizer, ids)) == "\ufffda"


@pytest.mark.parametrize("make", [byte_level, smollm2])
def test_each_token_of_plain_words_gives_its_text_at_once(make: Callable[[], Any]) -> None:
    tokenizer = make()
    assert all(pieces_of(tokenizer, tokenizer("the cat sat on the mat").input_ids)[:-1])


class Counting:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self.num_decoded = 0
        self._tokenizer = tokenizer
        self.all_special_ids = getattr(tokenizer, "all_special_ids", ())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded += len(token_ids)
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    "token", [SPECIAL, 0xFF, 0x80, 0xE2, 0x61], ids=["special", "never", "middle", "first", "letter"]
)
@pytest.mark.parametrize("make", [ByteTokenizer, ByT5Tokenizer])
def test_the_work_grows_with_the_tokens_and_no_faster(make: Callable[[], Any], token: int) -> None:
    counting = Counting(make())
    detokenizer = Detokenizer(Decoder(counting), ())
    ids = [token + 3 if make is ByT5Tokenizer else token] * 3000
    text = "".join([*map(detokenizer.push, ids), detokenizer.flush()])
    assert counting.num_decoded <= 60 * len(ids)
    assert text == make().decode(ids, skip_special_tokens=True)
