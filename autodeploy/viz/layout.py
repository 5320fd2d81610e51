"""Places boxes in layers, inputs above their readers: longest-path layers, barycentre order, and straight columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SWEEPS = 6


@dataclass(frozen=True)
class Box:
    """A box as it is placed; x and y of its upper left corner."""

    x: float
    y: float
    width: float
    height: float


def place(
    sizes: Mapping[str, tuple[float, float]],
    edges: Iterable[tuple[str, str]],
    gap: tuple[float, float],
    max_width: float = float("inf"),
) -> dict[str, Box]:
    """A box for each of `sizes` (width, height), none overlapping; `gap` is between neighbours and between layers.

    A layer wider than `max_width` goes on below. Edges that close a cycle are left out. Iterative.
    """
    order, inputs, users = _acyclic(list(sizes), edges)
    layer: dict[str, int] = {}
    for key in order:
        layer[key] = max((layer[source] + 1 for source in inputs[key]), default=0)
    for key in reversed(order):
        # An input that is read far below is drawn where it is read.
        if not inputs[key] and users[key]:
            layer[key] = min(layer[user] for user in users[key]) - 1
    rows: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for key in order:
        rows[layer[key]].append(key)
    _reduce_crossings(rows, inputs, users)
    return _positions(rows, sizes, inputs, gap, max_width)


Near = dict[str, list[str]]


def _acyclic(keys: list[str], edges: Iterable[tuple[str, str]]) -> tuple[list[str], Near, Near]:
    """A topological order, and the edges that agree with it."""
    users: Near = {key: [] for key in keys}
    waiting = dict.fromkeys(keys, 0)
    for source, user in dict.fromkeys(edges):
        if source != user:
            users[source].append(user)
            waiting[user] += 1
    ready = [key for key in keys if waiting[key] == 0]
    done: dict[str, int] = {}
    for key in _until_all(ready, keys, done):
        done[key] = len(done)
        for user in users[key]:
            waiting[user] -= 1
            if waiting[user] == 0:
                ready.append(user)
    inputs: Near = {key: [] for key in keys}
    for source in keys:
        users[source] = [user for user in users[source] if done[source] < done[user]]
        for user in users[source]:
            inputs[user].append(source)
    return list(done), inputs, users


def _until_all(ready: list[str], keys: list[str], done: Mapping[str, int]) -> Iterable[str]:
    """What is ready, and where a cycle keeps the rest from it, the first of the rest."""
    index, left = 0, iter(keys)
    while True:
        while index < len(ready):
            if ready[index] not in done:
                yield ready[index]
            index += 1
        stuck = next((key for key in left if key not in done), None)
        if stuck is None:
            return
        ready.append(stuck)


def _reduce_crossings(rows: list[list[str]], inputs: Near, users: Near) -> None:
    place = {key: float(index) for row in rows for index, key in enumerate(row)}
    for sweep in range(SWEEPS):
        near, order = (inputs, rows) if sweep % 2 == 0 else (users, rows[::-1])
        for row in order:
            row.sort(key=lambda key, near=near: _mean([place[other] for other in near[key]], place[key]))
            place |= {key: float(index) for index, key in enumerate(row)}


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _positions(
    rows: list[list[str]],
    sizes: Mapping[str, tuple[float, float]],
    inputs: Near,
    gap: tuple[float, float],
    max_width: float,
) -> dict[str, Box]:
    boxes: dict[str, Box] = {}
    y = 0.0
    for row in rows:
        wished = {key: _mean([boxes[source].x + boxes[source].width / 2 for source in inputs[key]], -1) for key in row}
        right = height = 0.0
        for key in row:
            width, own_height = sizes[key]
            x = max(right, min(wished[key] - width / 2, max_width - width))
            if right and x + width > max_width:
                x, y, height = 0.0, y + height + gap[1] / 2, 0.0
            boxes[key] = Box(x, y, width, own_height)
            right, height = x + width + gap[0], max(height, own_height)
        y += height + gap[1]
    return boxes
