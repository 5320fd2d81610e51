"""Watches a graph while passes rewrite it, so that every link between two moments of it is known, not guessed.

FX reports nodes that are created, erased or replaced; this is the only file that knows how. A node that is copied into
another graph is not reported, but takes its meta along, and with it the id that a `Recorder` wrote there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Protocol, Self

from torch import fx

from autodeploy.errors import OptionError
from autodeploy.graph.meta import NODE_ID
from autodeploy.viz.content import Hashes
from autodeploy.viz.history import Stage
from autodeploy.viz.infer import infer_fates
from autodeploy.viz.links import Links
from autodeploy.viz.read import graphs_of
from autodeploy.viz.snapshot import Snapshot
from autodeploy.viz.trace import Trace


class Step(Protocol):
    """What a pass is to a recorder."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class _Named:
    """A step that is somebody's code inside a `with` block."""

    name: str


class Record(Protocol):
    """What the runner says about a pass that has run."""

    @property
    def matches(self) -> int: ...

    @property
    def seconds(self) -> float: ...


class Recorder:
    """An observer that keeps the graph after each pass, and how its nodes came about.

        with Recorder() as recorder:
            pipeline.run(gm, passes, [recorder])
        recorder.trace()

    Anybody's pass that rewrites a graph in place is a step, too:

        with Recorder(gm, "my pass") as recorder:
            my_pass(gm)
        with recorder.step(gm, "another"):
            another(gm)

    Left by an exception, it records the pass that raised, with the graph that it left behind, as the last stage.
    """

    def __init__(self, gm: fx.GraphModule | None = None, name: str = "pass") -> None:
        self._first = (gm, name)
        self._stages: list[Stage] = []
        self._ids: dict[fx.Node, int] = {}
        self._numbers = count()
        self._hashes = Hashes()
        self._events = _Events()
        self._running: tuple[Step, fx.GraphModule, ExitStack] | None = None

    def before(self, step: Step, gm: fx.GraphModule) -> None:
        """Start to watch."""
        if not self._stages:
            self._stages.append(Stage("start", self._snapshot(gm, "start")))
        self._events = _Events()
        watching = ExitStack()
        watching.enter_context(_hooks(gm, self._events))
        self._running = (step, gm, watching)

    def after(self, step: Step, gm: fx.GraphModule, record: Record) -> None:
        """Keep what the pass did."""
        self._finish(record=record)

    @contextmanager
    def step(self, gm: fx.GraphModule, name: str) -> Iterator[None]:
        """Record what happens to `gm` inside as one step."""
        with self:
            self.before(_Named(name), gm)
            yield

    def __enter__(self) -> Self:
        (gm, name), self._first = self._first, (None, "")
        if gm is not None:
            self.before(_Named(name), gm)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            is_ours = isinstance(self._running[0], _Named)
            self._finish(error=_first_line(error) if error else "" if is_ours else "not finished")
        for node in self._ids:
            NODE_ID.take(node)

    def trace(self) -> Trace:
        """All stages so far, the graph before the first pass included. Raises OptionError where no pass ran."""
        if not self._stages:
            raise OptionError(
                "nothing was recorded", fix="give the recorder to the passes: apply(gm, recorder=recorder)"
            )
        return Trace(tuple(self._stages))

    def _finish(self, record: Record | None = None, error: str = "") -> None:
        assert self._running is not None, "after without before"
        step, gm, watching = self._running
        self._running = None
        watching.close()
        known = set(self._ids.values())
        origins = self._number(gm)
        snapshot = self._snapshot(gm, step.name)
        alive = set(snapshot.by_id)
        into = self._replacements(alive, known)
        self._add_observed(snapshot, into)
        for id, sources in origins.items():
            for source in sources:
                if source not in alive:
                    into.setdefault(source, (id,))
        matches, seconds = (record.matches, record.seconds) if record else (0, 0.0)
        options = "" if isinstance(step, _Named) else repr(step)
        self._stages.append(Stage(step.name, snapshot, options, matches, seconds, error, into, origins))

    def _snapshot(self, gm: fx.GraphModule, title: str) -> Snapshot:
        self._number(gm)
        nodes = _nodes(gm)
        for node in nodes:
            NODE_ID.set(node, self._ids[node])
        return Snapshot.of(gm, title, self._id, self._hashes)

    def _id(self, node: fx.Node) -> int:
        if node not in self._ids:
            self._ids[node] = next(
                self._numbers
            )  # a node that is not in the graph, of which a broken graph still reads
        return self._ids[node]

    def _number(self, gm: fx.GraphModule) -> dict[int, tuple[int, ...]]:
        """Give every new node an id; returns for each the ids of the nodes that it was made from.

        A copy of a node that is gone is that node, moved; a copy of one that is still there is a new one.
        """
        nodes = _nodes(gm)
        old = {self._ids[node]: node for node in self._ids}
        free = old.keys() - {self._ids[node] for node in nodes if node in self._ids}
        origins: dict[int, tuple[int, ...]] = {}
        # First in called graphs: what takes a result out of one may look like a node that has moved into it.
        for node in sorted((node for node in nodes if node not in self._ids), key=lambda node: node.graph is gm.graph):
            source = NODE_ID.get(node)
            if source is None and node.op == "output":
                source = next((id for id in free if old[id].op == "output"), None)
            if source in free and (old[source].op, old[source].target) == (node.op, node.target):
                free.discard(source)
                self._ids[node] = source
        for node in [node for node in nodes if node not in self._ids]:
            source = NODE_ID.get(node)
            self._ids[node] = next(self._numbers)
            if source in old:
                origins[self._ids[node]] = (source,)
        return origins

    def _replacements(self, alive: set[int], known: set[int]) -> dict[int, tuple[int, ...]]:
        """For each node that is gone, the nodes that it was replaced by."""
        found: dict[int, tuple[int, ...]] = {}
        for old in self._events.replaced:
            id = self._ids.get(old)
            if id in known and id not in alive:
                found[id] = self._standing_for(old, alive)
        return {id: new for id, new in found.items() if new}

    def _standing_for(self, old: fx.Node, alive: set[int]) -> tuple[int, ...]:
        """The first nodes that live on, where the replacements of `old` were replaced in turn."""
        found: dict[int, None] = {}
        pending, seen = [old], {old}
        while pending:
            for new in self._events.replaced.get(pending.pop(), ()):
                if new not in seen and self._ids.get(new) not in alive:
                    pending.append(new)
                elif new not in seen:
                    found[self._ids[new]] = None
                seen.add(new)
        return tuple(found)

    def _add_observed(self, snapshot: Snapshot, into: dict[int, tuple[int, ...]]) -> None:
        """What users read now instead of a node that FX did not report, because a pass set their arguments itself."""
        before = self._stages[-1].snapshot
        if before.by_id.keys() <= snapshot.by_id.keys() | into.keys():
            return
        links = Links(into=dict(into))
        for id in before.by_id.keys() & snapshot.by_id.keys():
            links.pair(id, id, "provenance")
        infer_fates(before, snapshot, links)
        found = links.into | {id: (survivor,) for id, survivor in links.merged.items()}
        into |= {id: new for id, new in found.items() if id not in into}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for _, module in graphs_of(gm) for node in module.graph.nodes]


class _Events:
    """What FX reported during one pass."""

    def __init__(self) -> None:
        self.names: dict[tuple[fx.Graph, str], fx.Node] = {}
        self.replaced: dict[fx.Node, dict[fx.Node, None]] = {}

    def created(self, node: fx.Node) -> None:
        self.names[node.graph, node.name] = node

    def rewired(self, old: fx.Node, new: str, user: fx.Node) -> None:
        """FX names the new node; a name that no node has yet is `old` being renamed."""
        node = self.names.get((old.graph, new))
        if node is None or node.name != new:
            node = next((node for node in old.graph.nodes if node.name == new), None)
        if node is not None and node is not old:
            self.replaced.setdefault(old, {})[node] = None


@contextmanager
def _hooks(gm: fx.GraphModule, events: _Events) -> Iterator[None]:
    """Tell `events` what happens to the graphs of `gm`."""
    modules = [module for _, module in graphs_of(gm)]
    for module in modules:
        for node in module.graph.nodes:
            events.created(node)

    # Plain functions: a deep copy of a GraphModule copies its hooks deeply, and must not copy what they tell.
    def created(node: fx.Node) -> None:
        events.created(node)

    def replaced(old: fx.Node, new: str, user: fx.Node) -> None:
        events.rewired(old, new, user)

    for module in modules:
        module._register_create_node_hook(created)
        module._register_replace_node_hook(replaced)
    try:
        yield
    finally:
        for module in modules:
            module._unregister_create_node_hook(created)
            module._unregister_replace_node_hook(replaced)
