"""How each kind of difference looks: colours that colour-blind readers can tell apart, each with a line style."""

from __future__ import annotations

from typing import NamedTuple


class Color(NamedTuple):
    """Fill and line on white, fill and line on black, as CSS."""

    fill: str
    line: str
    dark_fill: str
    dark_line: str


# Hues of Okabe and Ito, https://jfly.uni-koeln.de/color, made light for the fills.
COLORS: dict[str, Color] = {
    "unchanged": Color("#f3f4f6", "#9ca3af", "#1f2937", "#6b7280"),
    "changed": Color("#fdf3c7", "#b8860b", "#3d3310", "#f0e442"),
    "moved": Color("#dcf0fb", "#0072b2", "#0d2c3f", "#56b4e9"),
    "merged": Color("#f5e1ee", "#a3497c", "#3a1c2e", "#cc79a7"),
    "replaced": Color("#fde5d2", "#c04f00", "#43230d", "#e69f00"),
    "removed": Color("#fbdcd5", "#b23a00", "#431a0c", "#ff7f50"),
    "added": Color("#d3f1e7", "#007a5a", "#0b3327", "#00c796"),
}
DASHES: dict[str, str] = dict.fromkeys(COLORS, "") | {"removed": "5 3", "merged": "2 3", "moved": "8 3"}
