"""Options that mean nothing are refused with a word, before a model is loaded, traced or asked."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hash_model import LetterTokenizer
from tiny_models import tiny

import autodeploy as ad
from autodeploy.app import llm as llm_module
from autodeploy.errors import AutodeployError, OptionError, UnknownName, UnsupportedFeature

NAN = float("nan")
NO_COUNTS = ("8", b"8", 1.5, 2.0, NAN, -1, True, [8], (), {}, 8j, np.array([8, 8]), torch.tensor(8.0))
NO_SIZES = (*NO_COUNTS, 0, 2**31, 10**30)
SIZES = ("page_size", "max_num_seqs", "max_num_tokens", "max_model_len", "num_pages")
NO_FLAGS = (0, 1, None, "yes", "", [], np.True_)
BAD_OPTIONS: list[dict[str, Any]] = [
    *({size: bad} for size in SIZES for bad in NO_SIZES),
    {"max_num_seqs": None},
    {"num_pages": 1},
    {"max_model_len": 1},
    {"max_model_len": 513},
    {"max_num_seqs": 4, "max_num_tokens": 3},
    *({flag: bad} for flag in ("compile", "cuda_graphs") for bad in NO_FLAGS),
    *({"dtype": bad} for bad in ("bfloat16", torch.int8, torch.bool, torch.complex64, float, 16, torch.float32)),
    *({"tokenizer": bad} for bad in ("gpt2", 5, b"x", object(), [], False, LetterTokenizer, {"decode": len})),
    *({"backend": bad} for bad in (None, 5, True, b"sdpa", "", "spda", ["sdpa"], ("sdpa",), {"sdpa"}, {5: "sdpa"})),
    {"backend": {"full_atention": "sdpa"}},
    {"backend": {"full_attention": "spda"}},
    {"backend": {"full_attention": None}},
    {"backend": {"full_attention": ["sdpa"]}},
    {"backend": {"full_attention": "sdpa", "": "sdpa"}},
    {"backend": {"sdpa": "full_attention"}},
    {"backend": {None: "auto"}},
]
BAD_PARAMS: list[dict[str, Any]] = [
    *({"max_tokens": bad} for bad in (*NO_COUNTS, 0, None)),
    *({"top_k": bad} for bad in (*NO_COUNTS, None)),
    *({"temperature": bad} for bad in (-0.1, NAN, float("inf"), "hot", None, True, [1.0], 10**400, 1j, b"1")),
    *({"top_p": bad} for bad in (0, 0.0, 1.1, -1, NAN, "1", None, True, [], 2)),
    *({"seed": bad} for bad in (-1, 2**63, 1.5, "7", True, [1], NAN, b"1")),
    *({"stop": bad} for bad in (None, 5, True, "", b"x", ("a", ""), (1,), [None], {"a": 1}, {"a"}, iter("a"), [["a"]])),
    *({"ignore_eos": bad} for bad in NO_FLAGS),
]


def name_of(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={str(value)[:20]}" for name, value in options.items())


def test_there_are_many() -> None:
    assert len(BAD_OPTIONS) >= 92
    assert len(BAD_PARAMS) >= 60


@pytest.fixture(scope="module")
def llm() -> ad.LLM:
    return ad.LLM(tiny("llama", num_layers=1), compile=False)


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=name_of)
def test_bad_option_is_refused_before_anything(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(llm_module, "trace")
    monkeypatch.delattr(llm_module, "load_or_make")
    with pytest.raises(AutodeployError) as caught:
        ad.LLM(tiny("llama", num_layers=1), **options)
    assert caught.value.fix
    assert any(word in str(caught.value) for word in [*options, "backend", "layer type"])


@pytest.mark.parametrize("wrong", BAD_PARAMS, ids=name_of)
def test_bad_param_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(OptionError, match=rf"^{name} is .*\n.*SamplingParams\n.*it must be "):
        ad.SamplingParams(**wrong)


@pytest.mark.parametrize(
    "params", [{}, {"max_tokens": 5}, [], (), "", 0, False, 5, "greedy", ad.SamplingParams, [None]]
)
def test_what_is_no_params_is_refused(llm: ad.LLM, params: Any) -> None:
    for ask in (llm.generate, llm.stream, llm.stream_many):
        with pytest.raises(OptionError, match="params is a"):
            ask([5], params)


@pytest.mark.parametrize("chat", NO_FLAGS)
def test_what_is_no_chat_is_refused(llm: ad.LLM, chat: Any) -> None:
    for ask in (llm.generate, llm.stream, llm.stream_many):
        with pytest.raises(OptionError, match="chat is"):
            ask([5], chat=chat)


def test_integers_of_numpy_and_words_in_a_list_are_taken() -> None:
    params = ad.SamplingParams(np.int64(5), np.float32(0.5), np.uint8(3), np.float64(0.5), np.int32(7), stop=["a", "b"])  # type: ignore[arg-type]
    assert params == ad.SamplingParams(5, 0.5, 3, 0.5, 7, stop=("a", "b"))


@pytest.mark.parametrize(
    "options",
    [
        {"num_pages": 10**9},
        {"num_pages": 2**31 - 1, "page_size": 2**20},
        {"max_num_seqs": 10**9},
        {"max_num_tokens": 2**31 - 1, "max_num_seqs": 10**7},
        {"page_size": 10**9},
    ],
    ids=name_of,
)
def test_what_does_not_fit_into_memory_is_refused_with_the_figure(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"\d GB|\d bytes of cache"):
        ad.LLM(tiny("llama", num_layers=1), compile=False, **options)


def test_a_misspelt_layer_type_lists_the_known() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'sliding_attention'.*known: .*conv, full_attention"):
        ad.LLM("./no such folder", backend={"slidin_attention": "sdpa"})
    with pytest.raises(UnknownName, match="layer type or kind 'atention'"):
        ad.apply(ad.trace(tiny("llama", num_layers=1)), backend={"atention": "sdpa"})


def test_an_llm_is_neither_copied_nor_pickled(llm: ad.LLM) -> None:
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UnsupportedFeature, match="neither copied nor pickled"):
            take(llm)
