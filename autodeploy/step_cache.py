"""Compiled steps kept between processes: made once for a model, a version and a choice of options."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import transformers
from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

from autodeploy.lowering import Lowered
from autodeploy.ops.registry import backends, field_launcher
from autodeploy.pipeline import Pass


def step_key(model: transformers.PreTrainedModel, steps: Sequence[Pass]) -> str:
    """Hash of all that the compiled code depends on: the model's code and configuration, the shapes of its weights,
    the passes with their options and source, the backends, the device, and the versions of torch and transformers."""
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(repr(parts).encode())

    add(torch.__version__, transformers.__version__, torch.get_num_threads(), *_device(model.device))
    add(type(model).__qualname__, model.config.to_json_string(use_diff=False), _source_of(type(model)))
    for name, tensor in model.state_dict().items():
        add(name, tuple(tensor.shape), tensor.dtype)
    add(_package_hash(Path(__file__).parent))
    for step in steps:
        add(repr(step), _source_of(type(step)))
    for backend in backends():
        add(backend.name, _source_of(type(backend)))
    add(_source_of(type(field_launcher(model.device))))  # asking for it loads its op, which kept code calls
    return digest.hexdigest()[:32]


def load_or_make(folder: Path, make: Callable[[], Lowered], progress: Callable[[str], None]) -> tuple[Lowered, bool]:
    """The step in `folder` and True, or a new one from `make`, then kept there, and False.

    Inductor's kernels are kept beside it: an artifact holds their source only, and Inductor's own cache is a temporary
    folder by default.
    """
    with temporary_cache_dir(str(folder.parent / "inductor")):
        return _load_or_make(folder, make, progress)


def _load_or_make(folder: Path, make: Callable[[], Lowered], progress: Callable[[str], None]) -> tuple[Lowered, bool]:
    if (folder / "step.json").exists():
        try:
            return Lowered.load(folder), True
        except Exception as error:  # a file of another version can fail in any way; it is said, and made again
            progress(f"the compiled step in {folder} cannot be used ({type(error).__name__}: {error}); making it again")
            shutil.rmtree(folder, ignore_errors=True)
    lowered = make()
    _keep(lowered, folder, progress)
    return lowered, False


def _keep(lowered: Lowered, folder: Path, progress: Callable[[str], None]) -> None:
    """Write to a folder beside it and rename, so that no other process sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        lowered.save(building)
        os.replace(building, folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(building, ignore_errors=True)
        if not (folder / "step.json").exists():  # else another process was first, with the same
            progress(f"the compiled step is not kept, this run goes on: {error}")


def _device(device: torch.device) -> tuple[object, ...]:
    """What code for `device` is made for: its name and capability where they are known."""
    if device.type != "cuda":
        return (device.type,)
    return device.type, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def _source_of(cls: type) -> str:
    """Hash of the file that defines `cls`; empty where there is none, such as in a notebook."""
    try:
        return _file_hash(Path(inspect.getfile(cls)))
    except (OSError, TypeError):
        return ""


@cache
def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _package_hash(folder: Path) -> str:
    return hashlib.sha256("".join(_file_hash(path) for path in sorted(folder.rglob("*.py"))).encode()).hexdigest()
