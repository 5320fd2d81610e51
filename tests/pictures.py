"""What can be measured of a picture: boxes on top of each other, and edges that run behind boxes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

from autodeploy.viz.engine import Picture

Point = tuple[float, float]
_STEPS = 24  # points of a curve that are looked at


def around(picture: Picture, key: str) -> set[str]:
    """A box, and all frames that it lies in."""
    parents = {box["key"]: box["parent"] for box in picture.boxes}
    found = set()
    while key in parents:
        found.add(key)
        key = parents[key]
    return found


def overlaps(picture: Picture) -> list[tuple[str, str]]:
    """Pairs of boxes that lie on each other, neither inside the other."""
    inside = {box["key"]: around(picture, box["key"]) for box in picture.boxes}
    pairs = combinations(picture.boxes, 2)
    apart = [(a, b) for a, b in pairs if a["key"] not in inside[b["key"]] and b["key"] not in inside[a["key"]]]
    return [(a["key"], b["key"]) for a, b in apart if _overlap(a["rect"], b["rect"])]


def behind(picture: Picture) -> list[dict[str, Any]]:
    """The links that run behind a box or frame that neither end lies in."""
    return [link for link in picture.links if _crossed(picture, link)]


def _crossed(picture: Picture, link: dict[str, Any]) -> list[str]:
    own = around(picture, link["from"]) | around(picture, link["to"])
    others = [box for box in picture.boxes if box["key"] not in own and box["parent"] not in (link["from"], link["to"])]
    points = list(_curve(link["points"]))
    return [box["key"] for box in others if any(_is_in(point, box["rect"]) for point in points)]


def _curve(points: list[Point]) -> Iterator[Point]:
    """As `pathOf` draws it: between two points that are not below each other a curve that starts straight down."""
    for (x1, y1), (x2, y2) in pairwise(points):
        middle = (y1 + y2) / 2
        for step in range(_STEPS + 1):
            t = step / _STEPS
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
            yield (a * x1 + b * x1 + c * x2 + d * x2, a * y1 + b * middle + c * middle + d * y2)


def _is_in(point: Point, rect: tuple[float, float, float, float]) -> bool:
    x, y, width, height = rect
    return x + 1 < point[0] < x + width - 1 and y + 1 < point[1] < y + height - 1


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    apart_x = one[0] + one[2] <= other[0] or other[0] + other[2] <= one[0]
    return not (apart_x or one[1] + one[3] <= other[1] or other[1] + other[3] <= one[1])
