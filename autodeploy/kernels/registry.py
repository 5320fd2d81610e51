"""The providers that there are, in order of preference, and the fields: ours first, then those of entry points.

A provider says why it does not take something, and the first that takes it computes it: backends take the sites of
their kind, linear providers weights, a field launcher a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch

from autodeploy.errors import OptionError, UnknownName, UnsupportedFeature
from autodeploy.kernels.support import why_not as triton_why_not
from autodeploy.metadata.field import Field, FieldLauncher, registered
from autodeploy.ops import linear
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds import kinds
from autodeploy.ops.site import Site

# In the order in which "auto" prefers them, the oracles of the kinds last; each module defines BACKENDS.
_BACKEND_MODULES = (
    "triton_attention",
    "triton_conv1d",
    "varlen",
    "flashinfer",
    "causal_conv1d_package",
    "sdpa",
    "torch_conv1d",
    "torch_delta_rule",
    "torch_recurrence",
    "torch_latent",
    "torch_ssd",
    "torch_selective_scan",
)
# Linear layers in this order, too; each module defines PROVIDERS.
_LINEAR_MODULES = ("triton_linear", "transposed_linear")
_FIELD_MODULES = ("torch_fields", "tile_fields", "flashinfer_fields", "conv1d_fields", "chunk_fields")
_added: dict[str, Backend] = {}


def register_backend(backend: Backend) -> Backend:
    """Add a backend by hand (a package would use the entry-point group `autodeploy.backends`); it wins over ours."""
    if backend.kind not in {kind.name for kind in kinds()}:
        raise UnknownName("attention kind", backend.kind, (kind.name for kind in kinds()))
    _added[f"{backend.kind}/{backend.name}"] = backend
    return backend


@cache
def _installed() -> tuple[Backend, ...]:
    ours = [backend for name in _BACKEND_MODULES for backend in _of_module(name, "BACKENDS")]
    theirs = [point.load() for point in entry_points(group="autodeploy.backends")]
    return (*ours, *theirs)


def _of_module(module: str, name: str) -> Any:
    """What a module of kernels calls `name`; nothing where it is written in Triton and that is not installed."""
    try:
        return getattr(import_module(f"autodeploy.kernels.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return ()


def backends() -> tuple[Backend, ...]:
    """All backends: those registered by hand, then ours in order of preference, those of entry points, the oracles."""
    return (*_added.values(), *_installed(), *(kind.reference for kind in kinds()))


@cache
def load_linear() -> None:
    """Give the linear ops their providers, as `backends` gives attention its own."""
    for name in _LINEAR_MODULES:
        linear.providers.extend(_of_module(name, "PROVIDERS"))


@cache
def catalogue() -> tuple[Field, ...]:
    """Every field, ours first."""
    for name in _FIELD_MODULES:
        import_module(f"autodeploy.kernels.{name}")
    for point in entry_points(group="autodeploy.fields"):
        point.load()
    return registered()


def field_named(name: str) -> Field:
    """The field called `name`; raises UnknownName."""
    found = {entry.name: entry for entry in catalogue()}
    if name not in found:
        raise UnknownName("field", name, found)
    return found[name]


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
    return import_module("autodeploy.kernels.field_arena").LAUNCHER if triton_why_not(device) is None else None


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
