"""What becomes of a model, layer by layer: kind, span, backend, caches and fields; or what is refused, and why."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from autodeploy.app.models import DEMO, load_unfilled, resolve_config
from autodeploy.app.tiny import tiny_model
from autodeploy.compiler import pipeline
from autodeploy.compiler.apply import resolve_passes
from autodeploy.compiler.pipeline import NearMiss, PassRecord
from autodeploy.compiler.report import Ledger, Report
from autodeploy.errors import AutodeployError, UnknownName
from autodeploy.graph.edit import Pass, copy_module, placeholders
from autodeploy.graph.meta import CACHE_SPECS, SITE
from autodeploy.kernels.registry import check_backend_choice, choose_backend
from autodeploy.metadata.field import is_field, of_op
from autodeploy.ops.cache import Cache
from autodeploy.ops.kinds import kind_of
from autodeploy.ops.site import Site, path_of
from autodeploy.trace import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Every type that AutoModelForCausalLM makes, by name.
MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VERSIONS = {name: version(name) for name in ("autodeploy-fx", "torch", "transformers")}


@dataclass(frozen=True)
class CacheUse:
    """One cache of a layer: `num_bytes` for each `owner`, which is "token" or "sequence"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    owner: str
    num_bytes: int


@dataclass(frozen=True)
class Refusal:
    """An error of ours, in its parts; `pass_name` is that of the pass that raised it, empty for tracing."""

    error: str
    what: str
    where: str = ""
    fix: str = ""
    pass_name: str = ""

    @staticmethod
    def of(error: AutodeployError) -> Refusal:
        notes = [note.removeprefix("  pass:  ") for note in getattr(error, "__notes__", ())]
        return Refusal(type(error).__name__, error.what, error.where, error.fix, notes[0] if notes else "")


@dataclass(frozen=True)
class LayerCoverage:
    """One attention node. `caches` are its own; a layer that reads another's has none, and names it in `caches_of`.

    `fields` are read by the layer's backend; they are known where the whole graph went through.
    """

    path: str
    kind: str
    layer_type: str
    span: str
    backend: str = ""
    caches: tuple[CacheUse, ...] = ()
    caches_of: str = ""
    fields: tuple[str, ...] = ()
    refusal: Refusal | None = None

    def num_bytes(self, owner: str) -> int:
        """Bytes of cache for each token, or each sequence."""
        return sum(cache.num_bytes for cache in self.caches if cache.owner == owner)


@dataclass(frozen=True)
class Coverage:
    """Of one model. `refusal` is why it cannot be served, None where it can; there are layers where it was traced.

    `near_misses` have the names of their passes.
    """

    model: str
    versions: Mapping[str, str]
    seconds: float
    layers: tuple[LayerCoverage, ...] = ()
    refusal: Refusal | None = None
    near_misses: tuple[tuple[str, NearMiss], ...] = ()
    ledger: Ledger | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def coverage(
    model: str | PreTrainedModel,
    backend: str | Mapping[str, str] = "auto",
    *,
    dtype: torch.dtype | None = None,
    page_size: int | None = None,
) -> Coverage:
    """What becomes of `model`: a model type (a tiny one with random weights), a folder or hub id, of which only the
    configuration is read, or a loaded model.

    `dtype` is for weights that are made here: by default float32 for a type, and for a folder what its configuration
    says. What cannot be traced or served is in the result, not raised. Raises OptionError and UnknownName for
    arguments, ModelNotFound and DownloadError for a name that leads nowhere.
    """
    check_backend_choice(backend)
    steps = resolve_passes(None, backend, page_size)
    name = model if isinstance(model, str) else type(model).__name__
    start = time.perf_counter()
    if isinstance(model, str) and model not in MODEL_TYPES:
        model = load_unfilled(_folder(model), dtype)
    layers: list[LayerCoverage] = []
    found = Coverage(name, VERSIONS, 0.0)
    try:
        gm = trace(_tiny(model, dtype) if isinstance(model, str) else model)
        layers = [_planned(node, backend) for node in gm.graph.nodes if kind_of(node.target) is not None]
        found = _served(found, gm, steps, backend)
    except AutodeployError as error:
        refused = next((layer.refusal for layer in layers if layer.refusal), None)
        found = replace(found, layers=tuple(layers), refusal=refused or Refusal.of(error))
    return replace(found, seconds=round(time.perf_counter() - start, 2))


def _tiny(model_type: str, dtype: torch.dtype | None) -> PreTrainedModel:
    model = tiny_model(model_type)
    torch.nn.Module.to(model, dtype or torch.float32)
    return model


def _folder(name: str) -> Path:
    """Where the configuration of `name` is, which is no model type."""
    if name != DEMO and not re.search(r"[/\\.]", name) and not Path(name).is_dir():
        raise UnknownName("model type", name, MODEL_TYPES)
    return resolve_config(name)


def _planned(node: fx.Node, backend: str | Mapping[str, str]) -> LayerCoverage:
    """What a canonical node would become by itself."""
    kind = kind_of(node.target)
    assert kind is not None
    try:
        site = kind.describe(node)
    except AutodeployError as error:
        return LayerCoverage(path_of(node), kind.name, "", "", refusal=Refusal.of(error))
    try:
        return _layer(site, backend)
    except AutodeployError as error:
        return LayerCoverage(site.path, site.kind, site.layer_type, site.span.name, refusal=Refusal.of(error))


def _layer(site: Site, backend: str | Mapping[str, str]) -> LayerCoverage:
    chosen = choose_backend(site, backend)
    caches = tuple(map(_use, chosen.caches(site)))
    return LayerCoverage(site.path, site.kind, site.layer_type, site.span.name, chosen.name, caches)


def _use(cache: Cache) -> CacheUse:
    dtype = str(cache.dtype).removeprefix("torch.")
    return CacheUse(cache.name, cache.shape, dtype, cache.owner, cache.entry_bytes)


def _served(found: Coverage, gm: fx.GraphModule, steps: list[Pass], backend: str | Mapping[str, str]) -> Coverage:
    """`found` with the layers as all passes left them. Raises the error of the pass that refuses."""
    copy, seen = copy_module(gm), _CachedLayers(backend)
    records = pipeline.run(copy, steps, [seen])
    misses = tuple((record.name, miss) for record in records[: seen.num_passes] for miss in record.near_misses)
    return replace(found, layers=tuple(seen.layers), near_misses=misses, ledger=Report.of(records, copy).ledger)


class _CachedLayers:
    """An observer: the cached nodes right after they have come, when each has its metadata in front of it."""

    def __init__(self, backend: str | Mapping[str, str]) -> None:
        self.layers: list[LayerCoverage] = []
        self.num_passes = 0
        self._backend = backend

    def before(self, step: Pass, gm: fx.GraphModule) -> None:
        """Nothing is there yet."""

    def after(self, step: Pass, gm: fx.GraphModule, record: PassRecord) -> None:
        if self.layers:
            return
        self.num_passes += 1
        caches = dict(zip((node.name for node in placeholders(gm, "cache")), CACHE_SPECS.get(gm, ()), strict=True))
        owners: dict[str, str] = {}
        for site, reads, fields in _sites(gm):
            layer = _layer(site, self._backend)
            read = [name for name in reads if name in caches]
            owner = next((owners[name] for name in read if name in owners), "")
            owners |= {name: layer.path for name in read if name not in owners}
            own = () if owner else layer.caches
            self.layers.append(replace(layer, caches=own, caches_of=owner, fields=fields))


def _sites(gm: fx.GraphModule) -> list[tuple[Site, list[str], tuple[str, ...]]]:
    """Each site of `gm`, the names of what its nodes read, and the fields that were made for it, in front of them."""
    found: dict[int, tuple[Site, list[str], set[str]]] = {}
    waiting: list[fx.Node] = []
    for node in gm.graph.nodes:
        if is_field(node.target):
            waiting.append(node)
        if not SITE.on(node):
            continue
        site = SITE.of(node)
        _, reads, fields = found.setdefault(id(site), (site, [], set()))
        reads += [arg.name for arg in node.all_input_nodes]
        fields |= {of_op(field.target).name for field in waiting if path_of(field) in (site.path, field.name)}
        waiting = []
    return [(site, reads, tuple(sorted(fields))) for site, reads, fields in found.values()]
