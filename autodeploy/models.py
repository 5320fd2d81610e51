"""Where a model's name leads and how its files are loaded: the demo model, a local folder, or a hub id."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autodeploy import options
from autodeploy.demo import demo_model
from autodeploy.errors import DownloadError, ModelNotFound

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEMO = "demo"
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.tiktoken")


def print_progress(line: str) -> None:
    """One plain line on stderr, so that stdout stays the answer alone."""
    print(line, file=sys.stderr, flush=True)


def resolve_model(name: str, progress: Callable[[str], None] = print_progress) -> Path:
    """The folder that `name` leads to, downloaded first where need be.

    `name` is "demo", a local folder, or a Hugging Face hub id. Raises ModelNotFound, DownloadError, or
    MissingDependency (demo only).
    """
    if name == DEMO:
        return demo_model(options.from_environment().cache_dir, progress)
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves an unknown ~user as it is
    if path.is_dir():
        return _checked(path)
    if path.is_absolute() or name.startswith((".", "~")) or path.exists():
        raise ModelNotFound(f"{name!r} is not a folder", fix="give a folder, a hub id such as org/name, or 'demo'")
    return _checked(_download_from_hub(name, progress))


def _checked(folder: Path) -> Path:
    """`folder`, once it is known to hold a configuration and weights."""
    wanted = {"config.json": "config.json", "weights (*.safetensors)": "*.safetensors"}
    missing = [what for what, pattern in wanted.items() if not any(folder.glob(pattern))]
    if missing:
        raise ModelNotFound(
            f"no {' and no '.join(missing)} in this folder",
            where=str(folder),
            fix="give a folder written by transformers' save_pretrained",
        )
    return folder


def _download_from_hub(name: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    progress(f"fetching {name} from the Hugging Face hub")
    try:
        # Weights lie at the top of a repository; folders hold other formats.
        folder = snapshot_download(name, allow_patterns=[*_HUB_FILES], ignore_patterns=["*/*"])
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelNotFound(
            f"no model {name!r} on the Hugging Face hub, or no access to it",
            fix="check the spelling; a private or gated model needs `hf auth login`",
        ) from error
    except Exception as error:  # httpx, xet and OS errors reach here alike; they have no common base
        raise DownloadError(
            f"{name!r} could not be downloaded: {str(error).splitlines()[0]}",
            where="the Hugging Face hub",
            fix="check the network, or give a local folder or 'demo'",
        ) from error
    return Path(folder)


def load_model(path: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """The causal language model in `path`, in eval mode on the CPU, and its tokenizer (None where it has none).

    `dtype` is that of the weights; None keeps the dtype they were saved in. Only local files are read.
    Raises ModelNotFound where the folder is no complete model that transformers knows.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _without_progress_bars():
            # transformers' annotation leaves out that it returns a pair when asked for the loading info.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
            model, info = loaded
        has_tokenizer = any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True) if has_tokenizer else None
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFound(f"not a language model that transformers can load: {reason}", where=str(path)) from error
    # transformers fills absent weights with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise ModelNotFound(f"{len(missing)} weights are not in the files, {missing[0]} first", where=str(path))
    return model.eval(), tokenizer


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
