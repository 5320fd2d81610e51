"""The kinds of attention node and their backends, by name: ours first, then those of entry points."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType

import torch

from autodeploy.errors import OptionError, UnknownName, UnsupportedFeature
from autodeploy.ops.spec import Backend, FieldLauncher, Kind, Site

_KIND_MODULES = ("attention", "causal_conv1d")
# In the order in which "auto" prefers them, the oracle last; each module defines BACKENDS.
_BACKEND_MODULES = (
    "triton_attention",
    "triton_conv1d",
    "varlen",
    "flashinfer",
    "causal_conv1d_package",
    "sdpa",
    "torch_conv1d",
    "reference",
)
_added: dict[str, Backend] = {}


@cache
def kinds() -> tuple[Kind, ...]:
    """Every kind of attention node, in a fixed order."""
    return tuple(import_module(f"autodeploy.ops.{name}").KIND for name in _KIND_MODULES)


def kind_of(target: object) -> Kind | None:
    """The kind whose canonical op is `target`."""
    return next((kind for kind in kinds() if kind.op is target), None)


def register_backend(backend: Backend) -> Backend:
    """Add a backend by hand (a package would use the entry-point group `autodeploy.backends`); it wins over ours."""
    if backend.kind not in {kind.name for kind in kinds()}:
        raise UnknownName("attention kind", backend.kind, (kind.name for kind in kinds()))
    _added[f"{backend.kind}/{backend.name}"] = backend
    return backend


@cache
def _installed() -> tuple[Backend, ...]:
    ours = [backend for name in _BACKEND_MODULES for backend in _backends_in(name)]
    theirs = [point.load() for point in entry_points(group="autodeploy.backends")]
    return (*ours, *theirs)


def _backends_in(module: str) -> tuple[Backend, ...]:
    """The backends of a module of kernels; none where it is written in Triton and that is not installed."""
    try:
        return import_module(f"autodeploy.kernels.{module}").BACKENDS
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return ()


def backends() -> tuple[Backend, ...]:
    """All backends: those registered by hand, then ours in order of preference, then those of entry points."""
    return (*_added.values(), *_installed())


def triton_kernels(name: str, device: torch.device) -> ModuleType | None:
    """The module of Triton kernels of that name, loaded when first asked for; None where `device` does not run them."""
    reason = import_module("autodeploy.kernels.triton_support").why_not(device)
    return None if reason else import_module(f"autodeploy.kernels.{name}")


def choose_backend(site: Site, wanted: str | Mapping[str, str]) -> Backend:
    """The backend for `site`.

    `wanted` is "auto" (the first that supports the site), a backend's name (used for every kind that it exists for,
    "auto" for the rest), or a dict from layer type or kind to one of these.
    Raises UnknownName, or UnsupportedFeature with every backend's reason.
    """
    if isinstance(wanted, Mapping):
        wanted = wanted.get(site.layer_type) or wanted.get(site.kind) or "auto"
    names = {b.name for b in backends()} | {"auto"}
    if wanted not in names:
        raise UnknownName("backend", wanted, names)
    candidates = [b for b in backends() if b.kind == site.kind]
    named = [b for b in candidates if b.name == wanted]
    reasons = []
    for backend in named or candidates:
        reason = backend.why_not(site)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise UnsupportedFeature(
        f"no backend can run this {site.kind} ({'; '.join(reasons)})",
        where=site.path,
        fix="choose another backend for this layer type, or another dtype" if named else "file the model as a request",
    )


def field_launcher(device: torch.device) -> FieldLauncher | None:
    """What computes many fields at once on `device`, None where formulas do well enough."""
    kernels = triton_kernels("field_arena", device)
    return kernels and kernels.LAUNCHER


def check_backend_choice(wanted: str | Mapping[str, str]) -> None:
    """Raise before any work when `wanted` names something unknown."""
    names = {b.name for b in backends()} | {"auto"}
    for name in wanted.values() if isinstance(wanted, Mapping) else (wanted,):
        _check_name("backend", name, names)
    places = {place for kind in kinds() for place in (kind.name, *kind.layer_types)}
    for place in wanted if isinstance(wanted, Mapping) else ():
        _check_name("layer type or kind", place, places)


def _check_name(what: str, name: object, known: set[str]) -> None:
    if not isinstance(name, str):
        raise OptionError(
            f"a {what} is given by name, not by {type(name).__name__}", fix=f"known: {', '.join(sorted(known))}"
        )
    if name not in known:
        raise UnknownName(what, name, known)


def supports_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """None where attention in `dtype` runs on `device`, else why not (shared by the plain-torch backends)."""
    if dtype in (torch.float32, torch.bfloat16, torch.float64):
        return None
    if dtype is torch.float16 and device.type != "cpu":
        return None
    return f"{dtype} is not supported on {device.type}".replace("torch.", "")
