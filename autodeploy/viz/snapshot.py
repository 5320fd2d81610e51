"""A graph as it was at one moment: plain data that can be saved, sent and compared, without torch objects in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from torch import fx

from autodeploy.errors import OptionError
from autodeploy.viz.arguments import Ref, format_argument
from autodeploy.viz.content import Hashes
from autodeploy.viz.node import Node, node_from_json, node_to_json
from autodeploy.viz.pause import collector_paused
from autodeploy.viz.read import graphs_of, read_nodes
from autodeploy.viz.save import as_json, write
from autodeploy.viz.seethrough import calls, see_through

SCHEMA = "autodeploy.snapshot/1"


@dataclass(frozen=True, repr=False)
class Snapshot:
    """All nodes, those of the outermost graph first, then those of each graph that it calls; each in graph order."""

    nodes: tuple[Node, ...]
    title: str = ""

    def __repr__(self) -> str:
        return f"Snapshot({self.title!r}, {len(self.nodes)} nodes)"

    @staticmethod
    def of(
        gm: fx.GraphModule,
        title: str = "",
        id_of: Callable[[fx.Node], int] | None = None,
        hashes: Hashes | None = None,
    ) -> Snapshot:
        """`gm` as it is now. Ids count from 0 in order, unless `id_of` gives them. `hashes` are those known already."""
        if id_of is None:
            numbers = count()
            id_of = {node: next(numbers) for _, module in graphs_of(gm) for node in module.graph.nodes}.__getitem__
        with collector_paused():
            return Snapshot(tuple(read_nodes(gm, id_of, hashes or Hashes())), title)

    @cached_property
    def by_id(self) -> dict[int, Node]:
        """Node of each id."""
        return {node.id: node for node in self.nodes}

    @cached_property
    def position(self) -> dict[int, int]:
        """Place of each id in `nodes`."""
        return {node.id: index for index, node in enumerate(self.nodes)}

    @cached_property
    def callers(self) -> frozenset[int]:
        """The one call of each graph that is called once."""
        return frozenset(node.id for node in calls(self.nodes).values())

    @cached_property
    def source_of(self) -> dict[int, int]:
        """Where a value comes from that a node only hands on, over the border of a called graph: see `see_through`."""
        return see_through(self.nodes)

    @cached_property
    def inputs(self) -> dict[int, tuple[tuple[str, int], ...]]:
        """(place, id) of what each node reads, seen through the borders of called graphs.

        A graph that a failed pass left behind may read nodes that are not in it; those are left out.
        """
        source_of = {id: id for id in self.by_id} | self.source_of
        return {
            node.id: tuple((place, source) for place, id in node.inputs if (source := source_of.get(id)) is not None)
            for node in self.nodes
        }

    @cached_property
    def users(self) -> dict[int, list[tuple[str, int]]]:
        """(place, id) of what reads each node, seen through the borders of called graphs."""
        users: dict[int, list[tuple[str, int]]] = {node.id: [] for node in self.nodes}
        for user, inputs in self.inputs.items():
            for place, id in inputs:
                users[id].append((place, user))
        return users

    def name_of(self, id: int) -> str:
        """The node's name, `?` where an erased node is still referred to."""
        node = self.by_id.get(id)
        return node.name if node else "?"

    def format_node(self, node: Node) -> str:
        """`view = aten.view.default(linear, size=[1, s0, 64])`"""
        parts = []
        for name, argument in node.arguments:
            text = format_argument(argument, self.name_of)
            parts.append(text if isinstance(argument, Ref) or name.isdigit() else f"{name}={text}")
        return f"{node.name} = {node.target}({', '.join(parts)})"

    def to_json(self) -> dict[str, Any]:
        """Plain data with a versioned schema; keys at their default are left out."""
        return {"schema": SCHEMA, "title": self.title, "nodes": [node_to_json(node) for node in self.nodes]}

    def save(self, path: str | Path) -> None:
        """Write .json, for `autodeploy diff`. Raises OptionError for other endings."""
        write(path, self, {".json": as_json})

    @staticmethod
    def from_json(data: dict[str, Any]) -> Snapshot:
        """What `to_json` wrote. Raises OptionError for anything else."""
        with checked(data, SCHEMA):
            return Snapshot(distinct(map(node_from_json, data["nodes"])), str(data["title"]))


def distinct(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """`nodes`, each with an id of its own. Raises ValueError where two have the same."""
    listed = tuple(nodes)
    if len({node.id for node in listed}) < len(listed):
        raise ValueError("two nodes of one id")
    return listed


@contextmanager
def checked(data: Any, schema: str) -> Iterator[None]:
    """Raise OptionError unless `data` says that it is of this schema, and where reading it fails."""
    found = data.get("schema") if isinstance(data, dict) else None
    if found != schema:
        raise OptionError(f"expected data of schema {schema!r}, got {found!r}", fix="write it with this version again")
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"damaged data of schema {schema!r} ({reason})", fix="write it again") from error
