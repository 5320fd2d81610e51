"""Where a model's name leads and how its files are loaded: the demo model, a local folder, or a hub id."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autodeploy import options
from autodeploy.app.demo import demo_model
from autodeploy.errors import DownloadError, ModelNotFound, OptionError, UnsupportedFeature
from autodeploy.options import refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DEMO = "demo"
_CONFIG = {"config.json": "config.json"}
_WANTED = _CONFIG | {"weights (*.safetensors)": "*.safetensors"}
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.tiktoken")
# What transformers dequantizes while it loads.
_DEQUANTIZED = ("mxfp4",)
_DEQUANTIZE = "give a folder of plain weights: load it dequantized with transformers, then save_pretrained"
_REMOTE_CODE = "the folder asks for code that transformers has not, which is never run; use a model type that it has"


def print_progress(line: str) -> None:
    """One plain line on stderr, so that stdout stays the answer alone."""
    print(line, file=sys.stderr, flush=True)


def find_model(model: Any, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any]:
    """The model that `model` is or leads to, and the tokenizer in its folder, None where there is none.

    `dtype` is for weights that are yet to be loaded. Raises OptionError, or what `resolve_model` and `load_model` do.
    """
    from transformers import PreTrainedModel

    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise refusal("dtype", dtype, "a floating-point dtype of torch, such as torch.bfloat16")
    if isinstance(model, str | Path):
        return load_model(resolve_model(model), dtype)
    if not isinstance(model, PreTrainedModel):
        raise refusal("model", model, "'demo', a folder, a hub id, or a loaded transformers model")
    if dtype is not None:
        raise OptionError(f"dtype is {dtype} for a model that is loaded", fix="convert it first: model.to(dtype)")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or devices == {torch.device("meta")}:
        raise UnsupportedFeature(
            f"a model with its weights on {', '.join(sorted(map(str, devices))) or 'no device'}",
            where=type(model).__name__,
            fix="load it onto one device",
        )
    return model, None


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is neither None nor a tokenizer."""
    if tokenizer is not None and (
        isinstance(tokenizer, type | bytes) or not callable(getattr(tokenizer, "decode", None))
    ):
        raise refusal("tokenizer", tokenizer, "a loaded tokenizer, such as AutoTokenizer.from_pretrained gives")


def resolve_model(name: str | Path, progress: Callable[[str], None] = print_progress) -> Path:
    """The folder that `name` leads to, downloaded first where need be.

    `name` is "demo", a local folder, or a Hugging Face hub id; a Path is always a folder. Raises ModelNotFound,
    DownloadError, or MissingDependency (demo only).
    """
    return _resolve(name, progress, _WANTED, _HUB_FILES)


def resolve_config(name: str | Path, progress: Callable[[str], None] = print_progress) -> Path:
    """As `resolve_model`, where the folder needs no weights and none are downloaded."""
    return _resolve(name, progress, _CONFIG, ("config.json",))


def _resolve(
    name: str | Path, progress: Callable[[str], None], wanted: Mapping[str, str], hub_files: Sequence[str]
) -> Path:
    if name == DEMO:
        return demo_model(options.from_environment().cache_dir, progress)
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves an unknown ~user as it is
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name that no file can have
        is_folder, is_there = False, True
    if is_folder:
        return _checked(path, wanted)
    if isinstance(name, Path) or path.is_absolute() or name.startswith((".", "~")) or is_there:
        raise ModelNotFound(f"{str(name)!r} is not a folder", fix="give a folder, a hub id such as org/name, or 'demo'")
    return _checked(_download_from_hub(name, progress, hub_files), wanted)


def _checked(folder: Path, wanted: Mapping[str, str]) -> Path:
    """`folder`, once it is known to hold what is wanted, described and by pattern."""
    missing = [what for what, pattern in wanted.items() if not any(folder.glob(pattern))]
    if missing:
        raise ModelNotFound(
            f"no {' and no '.join(missing)} in this folder",
            where=str(folder),
            fix="give a folder written by transformers' save_pretrained",
        )
    return folder


def _download_from_hub(name: str, progress: Callable[[str], None], files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    progress(f"fetching {name} from the Hugging Face hub")
    try:
        # Weights lie at the top of a repository; folders hold other formats.
        folder = snapshot_download(name, allow_patterns=[*files], ignore_patterns=["*/*"])
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

    `dtype` is that of the weights; None keeps the dtype they were saved in. Only local files are read, and no code
    among them runs. Raises ModelNotFound where the folder is no complete model that transformers knows, and
    UnsupportedFeature for weights that are quantized.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_settings(_settings(path), path)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    # Any will do, as tracing puts another in its place; that of config.json may not be installed.
    attention = {"attn_implementation": "eager"}
    try:
        with _without_progress_bars():
            # transformers' annotation leaves out that it returns a pair when asked for the loading info.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **attention, **local
            )
            model, info = loaded
        has_tokenizer = any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(path, **local) if has_tokenizer else None
    except Exception as error:  # what is wrong in a file reaches here as anything; there is no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFound(
            f"not a language model that transformers can load: {reason}",
            where=str(path),
            fix=_REMOTE_CODE if "trust_remote_code" in str(error) else "",
        ) from error
    # transformers fills absent weights with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise ModelNotFound(f"{len(missing)} weights are not in the files, {missing[0]} first", where=str(path))
    if unused := sorted(info["unexpected_keys"]):
        print_progress(f"{len(unused)} weights in {path} are not of this model and not used, {unused[0]} first")
    packed = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if packed:
        raise UnsupportedFeature(f"the weights are packed, {packed[0]} first", where=str(path), fix=_DEQUANTIZE)
    return model.eval(), tokenizer


def load_unfilled(path: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that the configuration in `path` describes, in eval mode on the CPU, its weights never written.

    Memory that nobody touches costs none, whatever the model's size; what the weights hold is left to chance. `dtype`
    None is that of the configuration. Raises ModelNotFound and UnsupportedFeature as `load_model` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    _check_settings(_settings(path), path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        dtypes = {} if dtype is None else {"dtype": dtype}
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, attn_implementation="eager", **dtypes
            )
        model.tie_weights()
    except Exception as error:  # as in load_model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFound(
            f"not a language model that transformers can make: {reason}",
            where=str(path),
            fix=_REMOTE_CODE if "trust_remote_code" in str(error) else "",
        ) from error
    return model.eval()


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotFound(
            f"not a language model that transformers can load: config.json is not JSON: {error}", where=str(path)
        ) from error
    if not isinstance(settings, dict):
        raise ModelNotFound(
            "not a language model that transformers can load: config.json is no object", where=str(path)
        )
    return settings


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    """Refuse what makes transformers ask for more libraries, or for a kernel on the hub, which it would run."""
    for part in (settings, settings.get("text_config")):
        if not isinstance(part, dict):
            continue
        quantization = part.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if quantization and method not in _DEQUANTIZED:
            raise UnsupportedFeature(f"the weights are quantized by {method!r}", where=str(path), fix=_DEQUANTIZE)
        kernels = [key for key, value in part.items() if key.endswith("_implementation") and "/" in str(value)]
        if kernels:
            raise UnsupportedFeature(
                f"{kernels[0]} in config.json is {part[kernels[0]]!r}", where=str(path), fix=_REMOTE_CODE
            )


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
