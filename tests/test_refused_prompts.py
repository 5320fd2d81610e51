"""What is no prompt is refused with a word before anything is queued; what plainly is one is taken."""

from __future__ import annotations

from array import array
from collections import deque
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hash_model import LetterTokenizer
from tiny_models import VOCAB_SIZE, tiny
from transformers import BatchEncoding

import autodeploy as ad
from autodeploy.errors import AutodeployError, OptionError, RequestTooLong

GREEDY = ad.SamplingParams(max_tokens=4, ignore_eos=True)
GOOD = [5, 6, 7]


class WordTokenizer(LetterTokenizer):
    """A letter is a token; "!" is one that the model has not, and "?" is not known."""

    def __call__(self, text: str) -> SimpleNamespace:
        if "?" in text:
            raise KeyError("?")
        return SimpleNamespace(input_ids=[VOCAB_SIZE if letter == "!" else ord(letter) % 100 for letter in text])


@pytest.fixture(scope="module")
def llm() -> ad.LLM:
    return ad.LLM(tiny("llama", num_layers=1), WordTokenizer(), compile=False, max_model_len=128, num_pages=40)


def bad_prompts() -> list[Any]:
    """Each is bad by itself and as one of a list of prompts; made anew each time, as some can be read once."""
    no_lists = [None, 1.5, 5, True, b"abc", bytearray(b"abc"), memoryview(b"abc"), object(), len, int, ..., 1j]
    no_lists += [Decimal(1), Fraction(1), float("nan"), np.int64(5), np.float32(1), torch.tensor(5), np.array(5)]
    not_in_order = [{1, 2}, frozenset([1]), {5: 1}, {}, {"input_ids": [1]}, BatchEncoding({"input_ids": [1]})]
    not_in_order += [
        {"a": 1}.keys(),
        {1: 2}.values(),
        (i for i in [1, 2]),
        iter([1, 2]),
        map(int, "12"),
        zip([1], [2], strict=True),
    ]
    wrong_items = [[1.0], [1.5, 2], [float("nan")], [True], [False, True], [1, True], [np.bool_(True)], [np.float64(2)]]
    wrong_items += [[torch.tensor(1.0)], [torch.tensor(True)], [1, np.float32(3)], [2, 1j], [3, Decimal(1)]]
    outside = [[-1], [1, -1], [VOCAB_SIZE], [5, VOCAB_SIZE + 1], [2**31], [2**32 + 1], [2**63], [2**64], [10**100]]
    outside += [[-(2**31)], [-(2**63)], [-(10**30)], [np.int64(-1)], [np.uint64(2**63)], range(-1, 5), range(200)]
    outside += [np.array(ids) for ids in ([-1], [VOCAB_SIZE], [2**40])] + [np.array([2**63], np.uint64)]
    outside += [torch.tensor(ids) for ids in ([-1], [VOCAB_SIZE], [2**40])]
    arrays = [
        np.array([], np.int64),
        np.array([1.0]),
        np.ma.array([1, 500], mask=[False, True]),
        np.array([True]),
        np.array(["a"]),
        np.array([1j]),
        np.zeros((1, 2)),
    ]
    arrays += [np.array([[1, 2]]), np.array([[[1]]]), np.array([None]), np.array([1], object), np.array([1], "m8[s]")]
    arrays += [np.array([], np.float32), np.zeros((0, 3), int), np.zeros((3, 0), int), np.array([(1, 2)], "i4,i4")]
    tensors = [torch.tensor(x) for x in ([], [1.0], [True], [1j], [[1, 2]], [[[1]]], 1.5, [[]])]
    tensors += [torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64, device="meta")]
    tensors += [torch.ones(2, dtype=torch.int64).to_sparse(), torch.zeros(0, 3, dtype=torch.int64)]
    too_long = [[1] * 128, range(100), torch.ones(10**6, dtype=torch.int64), "a" * 1000]
    too_long[1] = [3] * 125
    wrong_items += [[b"a", b"b"], [object()], [np.datetime64(1, "s")]]
    words = ["\ud800", "a\udfffb", "\udc80" * 3, "", "wow!", "why?"]
    return no_lists + not_in_order + wrong_items + outside + arrays + tensors + too_long + words


NUM_BAD = len(bad_prompts())


def refuse(llm: ad.LLM, ask: Any, prompts: Any) -> None:
    before = llm.stats.num_steps
    with pytest.raises(AutodeployError) as caught:
        ask(prompts, GREEDY, chat=False)
    assert isinstance(caught.value, OptionError | RequestTooLong)
    assert caught.value.what
    assert len(str(caught.value)) < 500
    assert not llm._engine.has_work
    assert llm.stats.num_steps == before


def test_there_are_many() -> None:
    assert NUM_BAD >= 105


@pytest.mark.parametrize("index", range(NUM_BAD))
def test_bad_prompt_is_refused(llm: ad.LLM, index: int) -> None:
    refuse(llm, llm.generate, bad_prompts()[index])
    refuse(llm, llm.generate, [GOOD, bad_prompts()[index], GOOD])
    refuse(llm, llm.stream, bad_prompts()[index])
    refuse(llm, llm.stream_many, [bad_prompts()[index], GOOD])


@pytest.mark.parametrize(
    "nested", [[[]], [[[1]]], [[None]], [["a"]], [[GOOD, GOOD]], [np.array(GOOD), [GOOD]], [{}, 1]]
)
def test_wrongly_nested_lists_are_refused(llm: ad.LLM, nested: Any) -> None:
    refuse(llm, llm.generate, nested)
    refuse(llm, llm.stream_many, nested)
    refuse(llm, llm.stream, [nested])
    refuse(llm, llm.stream, [GOOD])


NUMPY_TYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
GOOD_PROMPTS = {
    "tuple": tuple(GOOD),
    "range": range(5, 8),
    "deque": deque(GOOD),
    "array": array("i", GOOD),
    "list of tensors": [torch.tensor(token) for token in GOOD],
    "reversed view": np.array(GOOD[::-1])[::-1],
    "read-only": np.broadcast_to(np.array(GOOD), (3,)),
    **{f"list of {kind.__name__}": [kind(token) for token in GOOD] for kind in NUMPY_TYPES},
    **{f"array of {kind.__name__}": np.array(GOOD, kind) for kind in NUMPY_TYPES},
    **{f"tensor of {kind}": torch.tensor(GOOD, dtype=kind) for kind in (torch.int64, torch.int32, torch.uint8)},
}


@pytest.mark.parametrize("prompt", GOOD_PROMPTS.values(), ids=GOOD_PROMPTS)
def test_what_is_plainly_a_prompt_is_taken(llm: ad.LLM, prompt: Any) -> None:
    expected = llm.generate(GOOD, GREEDY)
    assert llm.generate(prompt, GREEDY) == expected
    assert llm.generate([prompt, GOOD], GREEDY) == expected * 2
    assert "".join(llm.stream(prompt, GREEDY)) == expected[0].text


def test_words_and_ids_may_be_mixed_and_nothing_may_be_asked(llm: ad.LLM) -> None:
    words, ids = llm.generate(["word", GOOD], GREEDY)
    assert words == llm.generate("word", GREEDY)[0]
    assert ids == llm.generate(GOOD, GREEDY)[0]
    assert llm.generate([], GREEDY) == list(llm.stream_many([], GREEDY)) == []


def test_the_largest_token_id_is_taken_and_the_next_is_not(llm: ad.LLM) -> None:
    assert llm.generate([VOCAB_SIZE - 1, 0], GREEDY)[0].error is None
    with pytest.raises(OptionError, match=f"token id {VOCAB_SIZE}\n.*0 to {VOCAB_SIZE - 1}"):
        llm.generate([VOCAB_SIZE], GREEDY)


def test_ids_beyond_the_tokenizer_but_in_the_embedding_are_taken() -> None:
    """Embeddings are padded to a round number of rows."""
    llm = ad.LLM(tiny("llama", num_layers=1), compile=False)
    assert len(llm.generate([100, VOCAB_SIZE - 1], GREEDY)[0].token_ids) == 4
