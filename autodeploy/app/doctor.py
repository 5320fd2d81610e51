"""What is installed, what this machine has, and what is known by name: the lists behind the command line."""

from __future__ import annotations

import inspect
import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch

from autodeploy import options
from autodeploy.compiler.own_passes import own_passes
from autodeploy.kernels.registry import backends, catalogue
from autodeploy.ops.kinds import kinds
from autodeploy.ops.site import Site
from autodeploy.viz.table import table

_DISTRIBUTIONS = ("autodeploy-fx", "torch", "transformers", "triton", "flashinfer-python", "causal-conv1d", "gguf")


def pass_lines() -> list[str]:
    """The default passes in their order, each with the first line of its file."""
    return table([(step.name, _first_line(inspect.getmodule(type(step)))) for step in own_passes().default()])


def field_lines() -> list[str]:
    """Every field: name, shape, what it depends on beside the batch, meaning."""
    backends()  # loads the kernels, which register fields of their own
    rows = [(field.name, field.shape, field.depends or "-", field.meaning) for field in catalogue()]
    return table([("name", "shape", "depends", "meaning"), *rows])


def kind_lines() -> list[str]:
    """Every kind of attention node: name, the layer types that choose its backend, meaning."""
    rows = [(kind.name, ", ".join(kind.layer_types), kind.meaning) for kind in kinds()]
    return table([("name", "layer types", "meaning"), *rows])


def backend_lines() -> list[str]:
    """Every backend: the kind of node it runs, name, meaning; in the order in which "auto" prefers them."""
    rows = [(kind.name, backend.name, backend.meaning) for kind in kinds() for backend in _backends_of(kind.name)]
    return table([("kind", "name", "meaning"), *rows])


def doctor_lines() -> list[str]:
    """Versions, devices, compiler, cache, and which backends run a plain layer on each device or why they do not."""
    devices = _devices()
    rows = [
        ("python", platform.python_version()),
        *((name, _version(name)) for name in _DISTRIBUTIONS),
        *((str(device), description) for device, description in devices.items()),
        ("C++ compiler", _compiler()),
        ("torch.compile", _compile_backend()),
        ("cache", _cache()),
    ]
    lines = table(rows)
    for device in devices:
        for kind in kinds():
            # What a model is served in: half precision on a GPU.
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            lines += _backend_states(kind.example(dtype, device))
    return lines


def _backends_of(kind: str) -> list[Any]:
    return [backend for backend in backends() if backend.kind == kind]


def _backend_states(site: Site[Any]) -> list[str]:
    """A heading, and a line for each backend that says whether it runs the plain layer `site`, or why not."""
    states = [(f"  {backend.name}", backend.why_not(site) or "works") for backend in _backends_of(site.kind)]
    heading = f"{site.kind} in {site.dtype} on {site.device}".replace("torch.", "")
    return [heading, *table(states or [("  (none)", "")])]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[torch.device, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    found = {torch.device("cpu"): f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"}
    for index in range(torch.cuda.device_count()):
        found[torch.device("cuda", index)] = torch.cuda.get_device_name(index)
    return found


def _compiler() -> str:
    """The C++ compiler that Inductor would use on the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return "none found: compiling for the CPU needs one (g++ or clang++); --eager does without"


def _compile_backend() -> str:
    """Whether torch.compile finds our backend, which it does by what the installed distribution declares."""
    if "autodeploy" in entry_points(group="torch_dynamo_backends").names:
        return 'backend="autodeploy" is registered'
    return 'backend="autodeploy" is not registered: install this version of autodeploy-fx again'


def _cache() -> str:
    folder = options.from_environment().cache_dir
    models = folder / "models"
    names = sorted(path.name for path in models.iterdir() if not path.name.startswith(".")) if models.is_dir() else []
    return f"{folder} ({', '.join(names) or 'no models yet'})"


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]
