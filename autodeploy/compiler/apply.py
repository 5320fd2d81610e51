"""The composition root: `apply` joins the passes, the checks, the report and the history; `diff` compares graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import entry_points

from torch import fx

from autodeploy.compiler import pipeline
from autodeploy.compiler.own_passes import own_passes
from autodeploy.compiler.pipeline import Observer
from autodeploy.compiler.report import Report
from autodeploy.compiler.spec import ValueChecker
from autodeploy.compiler.verify import Verifier
from autodeploy.errors import OptionError, UnknownName
from autodeploy.graph.edit import Pass, copy_module
from autodeploy.graph.meta import CACHE_SPECS, LAYOUT_SPEC, TRACE_SECONDS
from autodeploy.kernels.registry import check_backend_choice
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.ops.cache import Cache
from autodeploy.viz import GraphDiff, Recorder, Snapshot, Trace


@dataclass(frozen=True, repr=False)
class Result:
    """What `apply` made: the new graph, and what was done to get there.

    `layout_spec` and `cache_specs` say what the graph takes beside the tokens; None and empty before caching.
    """

    module: fx.GraphModule
    report: Report
    layout_spec: LayoutSpec | None
    cache_specs: tuple[Cache, ...]

    @property
    def trace(self) -> Trace | None:
        """The graph after each pass, None where `apply` was given no recorder."""
        return self.report.trace

    def __repr__(self) -> str:
        return f"Result({len(self.module.graph.nodes)} nodes, {self.report!r})"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def apply(
    gm: fx.GraphModule,
    backend: str | Mapping[str, str] = "auto",
    *,
    passes: Sequence[Pass | str] | None = None,
    page_size: int | None = None,
    verify: bool = False,
    recorder: Recorder | None = None,
) -> Result:
    """Run the passes on a copy of `gm`, which stays as it is; weights are shared.

    `backend` is "auto", a backend's name, or a mapping from layer type or kind to a name. `passes` replaces the
    default list; a name stands for the default pass of that name. With `verify`, the graph is run before and after
    each pass on random ragged batches, and the first pass that changes a bit it may not change is an error; so is one
    that leaves a recorded value wrong. A `recorder` keeps the graph after each pass; when a pass raises, its `trace()`
    ends with that pass.
    Raises UnknownName, OptionError, NoAttentionFound, UnsupportedFeature or PassError.
    """
    if not isinstance(gm, fx.GraphModule):
        raise OptionError(f"{type(gm).__name__} is no FX graph", fix="give what ad.trace(model) returns")
    check_backend_choice(backend)
    steps = resolve_passes(passes, backend, page_size)
    copy = copy_module(gm)
    observers: list[Observer] = [ValueChecker(), Verifier()] if verify else []
    with recorder or nullcontext():
        records = pipeline.run(copy, steps, [recorder, *observers] if recorder else observers)
    report = Report.of(records, copy, TRACE_SECONDS.get(gm, 0.0), trace=recorder.trace() if recorder else None)
    return Result(copy, report, LAYOUT_SPEC.get(copy), tuple(CACHE_SPECS.get(copy, ())))


def diff(
    before: fx.GraphModule | Snapshot, after: fx.GraphModule | Snapshot, *, ignore: Iterable[str] = ()
) -> GraphDiff:
    """What differs between two graphs, their nodes matched: `str(...)`, `.summary()`, `.save("x.html")`.

    `ignore` leaves out differences of "names", "order", "device" or "meta". Raises UnknownName for other names.
    """
    for graph in (before, after):
        if not isinstance(graph, (fx.GraphModule, Snapshot)):
            raise OptionError(f"{type(graph).__name__} is no FX graph", fix="give two graphs or snapshots of them")
    return GraphDiff.of(before, after, ignore=ignore)


def resolve_passes(
    passes: Sequence[Pass | str] | None, backend: str | Mapping[str, str] = "auto", page_size: int | None = None
) -> list[Pass]:
    """The list to run: the default one, or `passes` with names looked up in it and in entry points."""
    known = {step.name: step for step in own_passes().default(backend, page_size)}
    if passes is None:
        return list(known.values())
    known |= {point.name: point.load()() for point in entry_points(group="autodeploy.passes") if point.name in passes}
    steps: list[Pass] = []
    for step in passes:
        if isinstance(step, str):
            if step not in known:
                raise UnknownName("pass", step, known)
            steps.append(known[step])
        elif isinstance(step, Pass):
            steps.append(step)
        else:
            raise OptionError(f"{step!r} is neither a pass nor the name of one")
    return steps
