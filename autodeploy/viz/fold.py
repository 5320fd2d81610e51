"""Folds what happened to every layer alike into one line, and shows the odd layer alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autodeploy.viz.changes import Change
from autodeploy.viz.classify import Entry
from autodeploy.viz.node import Node
from autodeploy.viz.snapshot import Snapshot

GLYPHS = {
    "unchanged": " ",
    "changed": "~",
    "moved": ">",
    "rewired": "<",
    "merged": "=",
    "replaced": "±",
    "removed": "-",
    "added": "+",
}
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_NUMBERED = re.compile(r"(?<=[A-Za-z])_\d+\b")  # what FX appends to keep names apart
_WORDS = 4  # different ops of one side of a line; beyond, they are only counted


@dataclass(frozen=True)
class Line:
    """One difference, found `count` times in each module of its block; `entries` are indices into `changed`.

    `module` is the path below the block's module, with `*` for numbers.
    """

    module: str
    text: str
    count: int
    entries: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Modules to which the same happened: `path` with `*` for what differs, `modules` the paths themselves."""

    path: str
    modules: tuple[str, ...]
    content: tuple[Line, ...]

    def lines(self) -> list[str]:
        """`30 x model.layers.*.self_attn: - scaled_dot_product_attention, + cached_attention`"""
        return [f"{self._times(line)}{self._where(line)}{line.text}" for line in self.content]

    def _times(self, line: Line) -> str:
        times = [str(number) for number in (len(self.modules), line.count) if number > 1]
        return "".join(f"{number} x " for number in times)

    def _where(self, line: Line) -> str:
        where = ".".join(part for part in (self.path, line.module) if part)
        return f"{where}: " if where else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, for readers of the diff's JSON."""
        return asdict(self)


def fold(before: Snapshot, after: Snapshot, changed: Sequence[Entry]) -> tuple[Block, ...]:
    """Blocks in the order in which their first difference comes."""
    modules: dict[str, dict[tuple[str, str], list[int]]] = {}
    for index, entry in enumerate(changed):
        layer, rest = split_layer(_module(before, after, entry))
        key = (_NUMBER.sub("*", rest), _describe(before, after, entry))
        modules.setdefault(layer, {}).setdefault(key, []).append(index)
    alike: dict[object, list[str]] = {}
    for layer, found in modules.items():
        content = frozenset((key, len(entries)) for key, entries in found.items())
        alike.setdefault((_NUMBER.sub("*", layer), content), []).append(layer)
    return tuple(_block(layers, modules) for layers in alike.values())


def _block(layers: list[str], modules: dict[str, dict[tuple[str, str], list[int]]]) -> Block:
    lines = []
    for (rest, text), first in modules[layers[0]].items():
        entries = [index for layer in layers for index in modules[layer][rest, text]]
        lines.append(Line(rest, text, len(first), tuple(entries)))
    path = layers[0] if len(layers) == 1 else _NUMBER.sub("*", layers[0])
    return Block(path, tuple(layers), tuple(lines))


def split_layer(path: str) -> tuple[str, str]:
    """A module path as that of the outermost numbered module, and the rest: `model.layers.3` and `mlp.act_fn`."""
    number = _NUMBER.search(path)
    return (path[: number.end()], path[number.end() + 1 :]) if number else (path, "")


def _module(before: Snapshot, after: Snapshot, entry: Entry) -> str:
    """Where an entry belongs: the module of its first node that has one. What was merged belongs to no layer."""
    if entry.kind == "merged":
        return ""
    ones, others = _nodes(before, entry.before), _nodes(after, entry.after)
    # A called graph serves many modules, whichever of them its nodes were first made for.
    sources = [after.by_id[after.source_of.get(node.id, node.id)] for node in others]
    called = [node.graph for node in sources if node.graph]
    return next((path for path in called + [node.module for node in ones + others] if path), "")


def _nodes(snapshot: Snapshot, ids: Iterable[int]) -> list[Node]:
    return [snapshot.by_id[id] for id in ids]


def _describe(before: Snapshot, after: Snapshot, entry: Entry) -> str:
    """What happened, without names of nodes or layers."""
    ones, others = _nodes(before, entry.before), _nodes(after, entry.after)
    if entry.kind == "merged":
        return f"= {_what(others[0])} for {len(ones)} duplicates"
    if entry.kind in ("changed", "moved"):
        details = "; ".join(_detail(change.what, change.before, change.after) for change in entry.changes)
        return f"{GLYPHS[entry.kind]} {_what(others[0])} ({details})"
    if entry.kind == "rewired":
        return f"< {_what(others[0])} (reads {_sources(after, entry.changes)})"
    sides = [("-", ones), ("+", others)]
    return ", ".join(f"{sign} {_ops(nodes)}" for sign, nodes in sides if nodes)


def _sources(after: Snapshot, changes: Sequence[Change]) -> str:
    """Where a node reads from now: `5 of prepare_metadata`, a called graph, or `2 that were merged`."""
    graphs = {node.name: node.graph for node in after.nodes if node.graph}
    counts = Counter(graphs.get(change.after, "") for change in changes)
    return ", ".join(f"{number} {f'of {graph}' if graph else 'that were merged'}" for graph, number in counts.items())


def _detail(what: str, before: str, after: str) -> str:
    if what in ("order", "name") or what.startswith("input "):
        return what
    texts = [_NUMBERED.sub("", text) or "(none)" for text in (before, after)]
    if what in ("module", "target"):
        texts = [_NUMBER.sub("*", text) for text in texts]
    return f"{what.removeprefix('argument ')} {texts[0]} -> {texts[1]}"


def _what(node: Node) -> str:
    """A node without what tells layers apart."""
    if node.op in ("placeholder", "get_attr", "call_module"):
        return f"{node.op} {_NUMBERED.sub('_*', _NUMBER.sub('*', node.target))}"
    return node.short_target


def _ops(nodes: list[Node]) -> str:
    """Results first, which is where a group's name is."""
    counts = Counter(map(_what, reversed(nodes)))
    words = [op if number == 1 else f"{number} {op}" for op, number in counts.items()]
    if len(words) > _WORDS:
        words = [*words[: _WORDS - 1], f"... ({len(nodes)} nodes)"]
    return ", ".join(words)
