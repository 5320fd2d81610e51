"""`torch.compile(model, backend="autodeploy")`: Inductor, with one prepare_metadata in its inference graphs.

Dynamo finds the backend by the entry point group `torch_dynamo_backends`; nobody has to import this package. A graph
goes to Inductor as it is. Our passes run inside, on the ATen graph right after AOTAutograd, where masks, positions and
rotary tables are plain ops with a copy per layer. Inductor does not lower calls of submodules, so that the shared
nodes are put back into the graph, in front of all others. Graphs that train are left to Inductor.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._guards import CompileContext, TracingContext
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass

from autodeploy import options as environment
from autodeploy.compiler import pipeline
from autodeploy.compiler.own_passes import own_passes
from autodeploy.compiler.report import Report
from autodeploy.errors import AutodeployError, OptionError, PassError, UnknownName
from autodeploy.graph.aliasing import storages
from autodeploy.graph.edit import Pass, placeholders
from autodeploy.graph.equality import mark_constants
from autodeploy.graph.meta import DESCRIPTION, GRAPH_ARGUMENT, MODEL_NAME, ROLE, TENSOR_DICT, VALUE
from autodeploy.graph.outline import inline
from autodeploy.viz import Recorder

_HOOK = "post_grad_custom_pre_pass"
# Older versions of torch take one pass, and do not tell it whether the graph trains.
_BASE: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass)
_TAKES_MANY = hasattr(custom_graph_pass, "get_custom_graph_passes")
_ON_ERROR = ("raise", "inductor")
# Whether the code came from Inductor's cache.
_WHY_NO_PASS = {True: "the code came from Inductor's cache", False: "Inductor had nothing to compile"}
_reports: deque[Report] = deque(maxlen=1000)


def autodeploy(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """The backend: compile `gm`, a graph of Dynamo's, for inputs like `example_inputs`.

    `mode` is one of torch.compile's. `options` are Inductor's, and `on_error`: what to do where a pass fails. "raise",
    the default, raises PassError; "inductor" warns and compiles the graph as it was, and keeps no code between
    processes, so that the next one is warned, too. With `record`, reports have a `trace`, and no code is kept, either.
    Raises UnknownName or OptionError for options.
    """
    options = dict(options or {})
    on_error = options.pop("on_error", "raise")
    settings = environment.from_environment()
    record = environment.flag("record", options.pop("record", settings.record))
    if on_error not in _ON_ERROR:
        raise OptionError(f"on_error={on_error!r}", fix=f"use one of {', '.join(_ON_ERROR)}")
    config = _inductor_config(mode, options)
    theirs = _as_list(config.get(_HOOK, inductor_config.post_grad_custom_pre_pass))
    if theirs and not _TAKES_MANY:
        raise OptionError(
            f"{_HOOK} is taken by another pass, and torch {torch.__version__} has room for one",
            fix="unset it, or use torch 2.13",
        )
    inputs = _Inputs(_roles(gm, example_inputs), _names(gm) if record else ())
    ours = _SharedMetadata(_compile_id(), inputs, set(storages(gm)), on_error == "inductor", record)
    config[_HOOK] = [*theirs, ours] if theirs else ours

    from torch._inductor.compile_fx import compile_fx

    hits = _num_cache_hits()
    compiled = compile_fx(gm, example_inputs, config_patches=config)
    if settings.pages is not None:
        _write_pages(settings.pages, ours.reports)
    _reports.extend(ours.reports or [Report.without_passes(ours.graph_name, _WHY_NO_PASS[_num_cache_hits() > hits])])
    return compiled


def reports() -> tuple[Report, ...]:
    """What was done to each graph that this process compiled with this backend, the last 1000, oldest first."""
    return tuple(_reports)


def last_report() -> Report | None:
    """The last of `reports()`; None where nothing was compiled yet."""
    return _reports[-1] if _reports else None


def _write_pages(folder: Path, reports: Sequence[Report]) -> None:
    """A page for each recorded graph: `0_1.html` of graph 0/1, `0_1.2.html` where there is a second of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, report in enumerate(report for report in reports if report.trace is not None):
        name = report.graph.replace("/", "_") or "graph"
        report.save(folder / f"{name}{f'.{index + 1}' if index else ''}.html")


class _Inputs(NamedTuple):
    """What each input of Dynamo's graph is to the passes, and, where that is to be recorded, to the model."""

    roles: tuple[str, ...]
    names: tuple[str, ...] = ()


class _SharedMetadata(_BASE):
    """Our passes, as one pass of Inductor's over the ATen graph of `graph_name` and the subgraphs in it.

    `inputs` are those of Dynamo's graph, `owned` the storages that it brings along, which are somebody's.
    """

    def __init__(
        self, graph_name: str, inputs: _Inputs, owned: set[Any], keeps_going: bool, records: bool = False
    ) -> None:
        self.graph_name, self.inputs, self.owned = graph_name, inputs, owned
        self.keeps_going, self.records = keeps_going, records
        self.reports: list[Report] = []

    def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
        gm = graph.owning_module
        assert gm is not None
        if is_inference is False or (is_inference is None and _is_training()):
            # Once, and not again for the backward graph.
            self.reports = [Report.without_passes(self.graph_name, "a graph that trains is left to Inductor")]
            return
        original = copy.deepcopy(graph) if self.keeps_going else None
        recorder = Recorder() if self.records else None
        try:
            self._give_roles(gm)
            mark_constants(gm, self.owned)
            with recorder or nullcontext():
                records = pipeline.run(gm, _passes(), [recorder] if recorder else [])
            inline(gm)
        except Exception as error:  # also those that no pass raised: here is the last place to fall back
            failure = "\n".join([str(error), *getattr(error, "__notes__", ())])
            if not isinstance(error, AutodeployError):
                failure = f"{type(error).__name__}: {failure}"
            if original is None:
                raise PassError(failure) from error
            gm.graph = original
            warnings.warn(f"graph {self.graph_name} is compiled by Inductor alone: {failure}", stacklevel=2)
            self.reports.append(Report.without_passes(self.graph_name, failure))
        else:
            trace = recorder.trace() if recorder else None
            self.reports.append(Report.of(records, gm, graph=self.graph_name, trace=trace))

    def uuid(self) -> str | None:
        if self.keeps_going or self.records:
            return None
        return f"autodeploy {_source_hash()} {self.inputs.roles} {bool(self.owned)}"

    def _give_roles(self, gm: fx.GraphModule) -> None:
        for node in placeholders(gm):
            ROLE.set(node, self._role(node))
            desc = DESCRIPTION.get(node)
            if self.inputs.names and isinstance(desc, PlainAOTInput):
                MODEL_NAME.set(node, self.inputs.names[desc.idx])

    def _role(self, node: fx.Node) -> str:
        desc = DESCRIPTION.get(node)
        if isinstance(desc, PlainAOTInput):
            return self.inputs.roles[desc.idx]
        if desc is not None and desc.is_param():
            return "weight"
        return _role_of_value(VALUE.get(node))


def _as_list(passes: Any) -> list[Any]:
    """What Inductor's option holds: nothing, a pass, or several."""
    if passes is None:
        return []
    return list(passes) if isinstance(passes, list | tuple) else [passes]


def _is_training() -> bool:
    """Whether AOTAutograd split the graph that is being compiled into forward and backward."""
    metadata: Any = TracingContext.get().fw_metadata
    assert metadata is not None
    return metadata.is_train


def _passes() -> list[Pass]:
    return [own_passes().ShareMetadata()]


def _roles(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[str, ...]:
    """What each input of a Dynamo graph is to the passes."""
    return tuple(_role(node, value) for node, value in zip(placeholders(gm), example_inputs, strict=True))


def _names(gm: fx.GraphModule) -> tuple[str, ...]:
    """What Dynamo says of where each input comes from, such as `L['self']._modules['norm']._parameters['weight']`."""
    arguments = [GRAPH_ARGUMENT.get(node) for node in placeholders(gm)]
    return tuple("" if argument is None else str(argument.source.name) for argument in arguments)


def _role(node: fx.Node, value: Any) -> str:
    if isinstance(value, torch.nn.Parameter):
        return "weight"
    argument = GRAPH_ARGUMENT.get(node)
    if argument is not None and argument.pass_arg_as_tensor and not argument.is_tensor:
        return "constant"  # a float of the model's code, that Dynamo passes as a tensor
    if "_dynamo_static_input_type" in (TENSOR_DICT.get(node) or {}):
        return "constant"  # a buffer, or another tensor that is an attribute of a module
    return _role_of_value(value)


def _role_of_value(value: Any) -> str:
    """Sizes, positions, lengths, masks and token ids are the layout; what depends on ids alone are masks."""
    is_tensor = isinstance(value, torch.Tensor)
    return "tokens" if is_tensor and (value.is_floating_point() or value.is_complex()) else "layout"


def _inductor_config(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The changes to Inductor's configuration that torch.compile makes of its arguments."""
    known = inductor_config.get_config_copy()
    for name in options:
        if not isinstance(name, str):
            raise OptionError(f"an option is called {name!r}", fix="name it by a string")
        if name.replace("-", "_") not in known:
            raise UnknownName("option", name, ["on_error", "record", *known])
    try:
        return dict(torch._TorchCompileInductorWrapper(mode, options, dynamic=None).config)
    except Exception as error:  # torch raises several sorts for a mode or a value that it does not know
        raise OptionError(f"mode={mode!r}, options={options!r}: {error}", where="torch.compile") from error


def _compile_id() -> str:
    """Dynamo's name of the graph that is being compiled: number of the frame, of its recompilation."""
    return str(CompileContext.current_compile_id() or "")


def _num_cache_hits() -> int:
    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]


@cache
def _source_hash() -> str:
    """Hash of the source of both packages: what code depends on, beside the graph and its inputs' roles."""
    folders = [Path(__file__).parents[1], Path(own_passes().__path__[0])]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
