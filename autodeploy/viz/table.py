"""Tables as lines of plain text, no wider than they are read: a cell that does not fit goes on below."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 80  # where there is no terminal


def table(rows: Sequence[Sequence[str]], *, right: bool = False, indent: int = 0) -> list[str]:
    """A line or more for each row; all columns but the first are aligned to the right where `right` says so."""
    width = shutil.get_terminal_size((_WIDTH, 0)).columns - indent
    grid = Table.grid(padding=(0, 2, 0, 0))
    for index in range(len(rows[0]) if rows else 0):
        grid.add_column(justify="right" if right and index else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, legacy_windows=False).print(grid)
    return [f"{' ' * indent}{line}".rstrip() for line in out.getvalue().splitlines()]
