"""A diff for the terminal: the summary as a tree of modules, then the folded differences node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.text import Text

from autodeploy import options
from autodeploy.viz.classify import PAIRED
from autodeploy.viz.fold import GLYPHS, Block, Line
from autodeploy.viz.table import table

if TYPE_CHECKING:
    from autodeploy.viz.classify import Entry
    from autodeploy.viz.difference import Difference
    from autodeploy.viz.story import Cost, Story

_STYLES = {"-": "red", "+": "green", "~": "yellow", ">": "cyan", "<": "blue", "=": "magenta", "@": "bold"}
_SHOWN_MODULES = 6


def render(diff: Difference) -> str:
    """Summary, metadata story and unified lines."""
    parts = [summary(diff), *([story(diff.story)] if diff.story else []), unified(diff)]
    return "\n\n".join(part for part in parts if part)


def print_diff(diff: Difference, file: TextIO) -> None:
    """Print as wide as the terminal and in colour; in full and plain where `file` is none."""
    if not file.isatty():
        print(render(diff), file=file)
        return
    console = Console(file=file, no_color=not options.from_environment().color, highlight=False)
    for line in render(diff).splitlines():
        style = _STYLES.get(line.lstrip()[:1], "")
        console.print(Text(line, style), no_wrap=True, overflow="ellipsis")


def summary(diff: Difference) -> str:
    """Counts, then every block with its lines below it."""
    lines = [diff.headline()]
    for block in diff.blocks:
        lines += _tree(block)
    return "\n".join(lines)


def _tree(block: Block) -> list[str]:
    times = f"{len(block.modules)} x " if len(block.modules) > 1 else ""
    lines = [f"  {times}{block.path or '(outside modules)'}{which(block)}"]
    for module in dict.fromkeys(line.module for line in block.content):
        indent = "    "
        if module:
            lines.append(f"    {module}")
            indent = "      "
        for line in block.content:
            if line.module == module:
                lines.append(f"{indent}{_repeated(line)}{line.text}")
    return lines


def _repeated(line: Line) -> str:
    return f"{line.count} x " if line.count > 1 else ""


def which(block: Block) -> str:
    """What `*` stands for."""
    if len(block.modules) == 1:
        return ""
    prefix = block.path.partition("*")[0]
    names = [module.removeprefix(prefix) for module in block.modules]
    return f" ({', '.join(_ranges(names))})"


def _ranges(names: list[str]) -> list[str]:
    """Numbers in a row as a range: 0-3, 5."""
    if not all(name.isdigit() for name in names):
        return names[:_SHOWN_MODULES] + ["..."] * (len(names) > _SHOWN_MODULES)
    rows: list[list[int]] = []
    for number in sorted(map(int, names)):
        if rows and rows[-1][-1] == number - 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    return [str(row[0]) if len(row) == 1 else f"{row[0]}-{row[-1]}" for row in rows]


def story(told: Story) -> str:
    """What became of the metadata, who reads each field, and the ledger."""
    lines = [headline(told), f"  ({told.subgraphs} subgraphs; {told.beside} sizes and constants went with them)"]
    rows = [["field", "value", "read by"]]
    for field in told.fields:
        readers = ", ".join(f"{number} x {op}" for op, number in field.readers.items())
        name = field.name if field.op in field.name else f"{field.name} ({field.op})"
        rows.append([name, field.value, readers or "(nobody)"])
    lines += table(rows, indent=2)
    rows = [["per step", "before", "after"]]
    rows += [[name, _cost(told.before, name), _cost(told.after, name)] for name in _LEDGER]
    return "\n".join(lines + table(rows, indent=2))


def headline(told: Story) -> str:
    """`116 nodes of metadata became one node of 32`"""
    return f"{told.before.nodes} nodes of metadata became one node of {told.after.nodes}"


_LEDGER = ("nodes", "launches", "copies", "bytes")


def _cost(cost: Cost, name: str) -> str:
    unsized = f" + {cost.unsized} of unknown shape" if name == "bytes" and cost.unsized else ""
    return f"{getattr(cost, name)}{unsized}"


def unified(diff: Difference) -> str:
    """The nodes behind each folded line, those of its first layer for all."""
    lines = []
    for block in diff.blocks:
        for line in block.content:
            number = len(line.entries)
            others = f" (1 of {number} alike)" if number > 1 else ""
            where = ".".join(part for part in (block.modules[0], line.module) if part)
            lines.append(f"@ {where or '(outside modules)'}{others}")
            lines += _nodes(diff, diff.changed[line.entries[0]])
    return "\n".join(lines)


def _nodes(diff: Difference, entry: Entry) -> list[str]:
    ones = [diff.before.format_node(diff.before.by_id[id]) for id in entry.before]
    others = [diff.after.format_node(diff.after.by_id[id]) for id in entry.after]
    if entry.kind == "merged":
        return [f"= {line}" for line in ones] + [f"  {line}" for line in others]
    if entry.kind in PAIRED:
        details = "; ".join(map(str, entry.changes))
        alone = entry.kind in ("moved", "rewired") or ones == others
        lines = [f"{GLYPHS[entry.kind]} {others[0]}"] if alone else [f"- {ones[0]}", f"+ {others[0]}"]
        return [*lines, f"    {details}"]
    into = [f"    {change}" for change in entry.changes]
    return [f"- {line}" for line in ones] + [f"+ {line}" for line in others] + into
