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
    "rewired": Color("#e6e4fb", "#4f46c8", "#211d4d", "#a9a4ff"),
    "merged": Color("#f5e1ee", "#a3497c", "#3a1c2e", "#cc79a7"),
    "replaced": Color("#fde5d2", "#c04f00", "#43230d", "#e69f00"),
    "removed": Color("#fbdcd5", "#b23a00", "#431a0c", "#ff7f50"),
    "added": Color("#d3f1e7", "#007a5a", "#0b3327", "#00c796"),
}
_MONO = 'ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace'
LIGHT = {
    "paper": "#fff",
    "canvas": "#f8fafc",
    "text": "#111827",
    "dim": "#4b5563",
    "rule": "#d1d5db",
    "soft": "#eef1f5",
    "accent": "#0050a0",
    "edge": "#8b95a5",
    "mono": _MONO,
}
DARK = {
    "paper": "#0d1117",
    "canvas": "#10151d",
    "text": "#f3f4f6",
    "dim": "#b4bcc8",
    "rule": "#343c49",
    "soft": "#1b222d",
    "accent": "#7db7ff",
    "edge": "#76818f",
    "mono": _MONO,
}
DASHES: dict[str, str] = dict.fromkeys(COLORS, "") | {
    "removed": "5 3",
    "merged": "2 3",
    "moved": "8 3",
    "rewired": "10 2 2 2",
}


def kind_rules() -> str:
    """How a box or frame of each kind of difference looks in a picture."""
    return "".join(
        f".ad-picture .{kind} > .border {{ stroke: var(--{kind}-line); stroke-dasharray: {DASHES[kind] or 'none'}; }}\n"
        f".ad-picture .box.{kind} > .border, .ad-picture .{kind} > .bar {{ fill: var(--{kind}-fill); }}\n"
        for kind in COLORS
    )


def variables(dark: bool) -> dict[str, str]:
    """The value of each colour on white or on black."""
    lines = {f"{kind}-line": color.dark_line if dark else color.line for kind, color in COLORS.items()}
    fills = {f"{kind}-fill": color.dark_fill if dark else color.fill for kind, color in COLORS.items()}
    return lines | fills | (DARK if dark else LIGHT)


def declarations(dark: bool) -> str:
    """`variables` as CSS."""
    return "".join(f"--{name}:{value};" for name, value in variables(dark).items())
