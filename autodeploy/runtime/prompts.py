"""What may be a prompt: words, or token ids in anything that is plainly a list of integers; all else is refused."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from autodeploy.errors import OptionError

Prompt = str | Sequence[int] | np.ndarray | torch.Tensor
_WANTED = "give a string, a list of token ids, or a list of such prompts"
_INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LARGEST_ID = 2**31  # a step reads int32


def split_prompts(prompts: Any) -> list[Any]:
    """The prompts of `prompts`, which may be one. Raises OptionError for what is no prompt and no list of prompts."""
    if isinstance(prompts, str | np.ndarray | torch.Tensor):
        return [prompts]
    _check_is_list(prompts)
    # A list of single numbers is one prompt, also where one of them is no token id: it is refused as such.
    if len(prompts) and all(_is_number(item) for item in prompts):
        return [prompts]
    return list(prompts)


def check_words(prompt: str) -> None:
    """Refuse a string that is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"a prompt with half of a surrogate pair, {prompt[error.start]!a} at {error.start}",
            fix='decode the text that it came from with errors="replace"',
        ) from error


def as_token_ids(prompt: Any, vocab_size: int | None = None) -> np.ndarray:
    """`prompt` as an array [n] of token ids below `vocab_size`, the rows of the model's embedding.

    Raises OptionError for anything but a non-empty list, 1-D array or 1-D tensor of them.
    """
    ids = _as_array(prompt)
    if ids.ndim != 1:
        raise OptionError(
            f"a prompt of shape {list(ids.shape)}", fix="give each prompt by itself, one-dimensional, without padding"
        )
    if not ids.size:
        raise OptionError("a prompt without tokens", fix="give at least one token id")
    end = vocab_size or _LARGEST_ID
    outside = [token for token in (int(ids.min()), int(ids.max())) if not 0 <= token < end]
    if outside:
        raise OptionError(
            f"a prompt with token id {outside[0]}",
            fix=f"the model's token ids are 0 to {end - 1}; a tokenizer that gives others is another model's",
        )
    return ids


def _as_array(prompt: Any) -> np.ndarray:
    if isinstance(prompt, torch.Tensor):
        if prompt.dtype not in _INT_DTYPES or prompt.layout != torch.strided or prompt.is_meta:
            raise OptionError(
                f"a prompt of {prompt.dtype} on {prompt.device}", fix="give token ids, which are integers"
            )
        return prompt.detach().cpu().numpy()
    if isinstance(prompt, np.ma.MaskedArray):
        raise OptionError("a prompt that is a masked array", fix="give its .compressed()")
    if isinstance(prompt, np.ndarray):
        if prompt.dtype.kind not in "iu":
            raise OptionError(f"a prompt of {prompt.dtype}", fix="give token ids, which are integers")
        return prompt
    _check_is_list(prompt)
    for index, item in enumerate(prompt):
        if not _is_token_id(item):
            raise OptionError(f"a prompt with {_named(item)} at {index}", fix=_WANTED)
    return np.array([int(item) for item in prompt], dtype=object if _is_any_large(prompt) else np.int64)


def _check_is_list(prompt: Any) -> None:
    if isinstance(prompt, Mapping):
        raise OptionError(f"a prompt that is a {type(prompt).__name__}", fix='give its ["input_ids"]')
    if isinstance(prompt, str | bytes | bytearray | memoryview) or not isinstance(prompt, Sequence):
        raise OptionError(f"a prompt that is {_named(prompt)}", fix=_WANTED)


def _is_token_id(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        return item.ndim == 0 and item.dtype in _INT_DTYPES and not item.is_meta
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float | np.generic) or (isinstance(item, torch.Tensor) and item.ndim == 0)


def _is_any_large(prompt: Sequence[Any]) -> bool:
    """Whether a token id does not fit int64; numpy would round some of these to floats."""
    return any(not -(2**63) <= int(item) < 2**63 for item in prompt)


def _named(item: Any) -> str:
    return "None" if item is None else f"{type(item).__name__} {reprlib.repr(item)}"
