"""The modules of a graph as a tree that a reader can open piece by piece, no piece of it too large to be looked at.

model                       model
  layers.0 (attn, mlp)        layers.0 (attn, mlp)
  layers.1 (attn, mlp)        layers.1 … layers.29, 29 alike
  ...
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

MAX_ITEMS = 60  # of one group; what has more is divided into groups in order
_MAX_DEPTH = 24  # a name with more parts than any real model's stays in one piece from here on
_RUN = 3  # neighbours that are alike from this number on are put away behind the first
_BORDER = re.compile(r"\.(?!\d+(?:\.|$))")  # layers.0 is one step down, not two
_NUMBER = re.compile(r"\d+")


@dataclass
class Group:
    """A module, or some of the items of one: `alike` says how many modules that look the same it stands for.

    `items` are groups and the indices of nodes, in order. `label` is what `path` adds to the group around it.
    """

    label: str
    path: str
    items: list[int | Group] = field(default_factory=list)
    alike: int = 0


def split_path(path: str) -> tuple[str, ...]:
    """`model.layers.0.attn` as model, layers.0, attn."""
    parts = _BORDER.split(path, maxsplit=_MAX_DEPTH) if path else []
    return tuple(parts)


def build_tree(homes: Mapping[int, Sequence[str]], looks: Mapping[int, Hashable]) -> Group:
    """The tree of numbered nodes, each at its path; two modules are alike if their nodes' `looks` are equal in order.

    Empty homes are the root's. A module of one node is not a group of its own.
    """
    root = Group("", "")
    groups: dict[tuple[str, ...], Group] = {(): root}
    for number, home in homes.items():
        _group_of(tuple(home), groups).items.append(number)
    _tidy(root, looks)
    return root


def _group_of(home: tuple[str, ...], groups: dict[tuple[str, ...], Group]) -> Group:
    if home not in groups:
        groups[home] = Group(home[-1], ".".join(home))
        _group_of(home[:-1], groups).items.append(groups[home])
    return groups[home]


def _tidy(group: Group, looks: Mapping[int, Hashable]) -> Hashable:
    """Simplify what is below `group`; returns how it looks."""
    seen: list[Hashable] = []
    items: list[int | Group] = []
    for item in group.items:
        seen.append(looks[item] if isinstance(item, int) else (_NUMBER.sub("*", item.label), _tidy(item, looks)))
        items.append(_plain(item))
    group.items = _divided(_folded(items, seen), group.path)
    return tuple(seen)


def _plain(item: int | Group) -> int | Group:
    """A group without the frames that hold nothing but one item."""
    if isinstance(item, int) or len(item.items) != 1:
        return item
    (only,) = item.items
    if isinstance(only, int):
        return only
    return Group(f"{item.label}.{only.label}", only.path, only.items, only.alike)


def _folded(items: list[int | Group], looks: list[Hashable]) -> list[int | Group]:
    """`items` where of neighbouring groups that look the same all but the first are one group."""
    found: list[int | Group] = []
    for run in _runs(items, looks):
        groups = [item for item in run if isinstance(item, Group)]
        if len(groups) < _RUN:
            found += run
            continue
        first, last = groups[1], groups[-1]
        found += [
            groups[0],
            Group(_from_to(first, last), first.path.removesuffix(first.label).rstrip("."), run[1:], len(run) - 1),
        ]
    return found


def _runs(items: list[int | Group], looks: list[Hashable]) -> Iterator[list[int | Group]]:
    run: list[int | Group] = []
    for index, item in enumerate(items):
        if run and (isinstance(item, int) or isinstance(run[-1], int) or looks[index] != looks[index - 1]):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _divided(items: list[int | Group], path: str) -> list[int | Group]:
    """`items` in groups of at most `MAX_ITEMS`, as deep as it takes."""
    while len(items) > MAX_ITEMS:
        size = -(-len(items) // -(-len(items) // MAX_ITEMS))
        parts = [(start, items[start : start + size]) for start in range(0, len(items), size)]
        items = [Group(_range_label(part, start), path, part) for start, part in parts]
    for item in items:
        if isinstance(item, Group):
            item.items = _divided(item.items, item.path)
    return items


def _range_label(part: Sequence[int | Group], start: int) -> str:
    first, last = part[0], part[-1]
    if isinstance(first, Group) and isinstance(last, Group):
        return _from_to(first, last)
    return f"{start + 1} … {start + len(part)}"


def _from_to(first: Group, last: Group) -> str:
    return f"{first.label.partition(' … ')[0]} … {last.label.rpartition(' … ')[2]}"
