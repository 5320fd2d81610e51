"""Checks for CI: what of a diff is a failure, the `diff` command, and the helper for tests."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from autodeploy.errors import OptionError, UnknownName
from autodeploy.viz.changes import IGNORABLE
from autodeploy.viz.diff import WRITERS, GraphDiff
from autodeploy.viz.duplicates import duplicate_metadata
from autodeploy.viz.history import SCHEMA as TRACE_SCHEMA
from autodeploy.viz.snapshot import SCHEMA, Snapshot
from autodeploy.viz.text import print_diff
from autodeploy.viz.trace import Trace


def assert_graph_diff(
    before: Snapshot | fx.GraphModule, after: Snapshot | fx.GraphModule, expected: str, *, ignore: Iterable[str] = ()
) -> GraphDiff:
    """Raise AssertionError, with both in it, unless the folded lines of the diff are those of `expected`.

    Lines are compared in order, without indentation and empty lines; an empty text expects no difference.
    """
    diff = GraphDiff.of(before, after, ignore=ignore)
    wanted = [line.strip() for line in expected.splitlines() if line.strip()]
    found = diff.lines()
    if found != wanted:
        delta = "\n".join(difflib.unified_diff(wanted, found, "expected", "found", lineterm=""))
        raise AssertionError(f"the graphs do not differ as expected\n{delta}\n\n{diff}")
    return diff


def _with_change(*kinds: str) -> Callable[[GraphDiff], list[str]]:
    def find(diff: GraphDiff) -> list[str]:
        entries = (entry for entry in diff.entries if any(change.kind in kinds for change in entry.changes))
        return [diff.after.name_of(entry.after[0]) for entry in entries if entry.after]

    return find


def _added(diff: GraphDiff) -> list[str]:
    entries = (entry for entry in diff.entries if entry.kind in ("added", "replaced"))
    return [diff.after.name_of(id) for entry in entries for id in entry.after]


def _removed(diff: GraphDiff) -> list[str]:
    entries = (entry for entry in diff.entries if entry.kind in ("removed", "replaced"))
    return [diff.before.name_of(id) for entry in entries for id in entry.before]


def _duplicates(diff: GraphDiff) -> list[str]:
    return [" = ".join(names) for names in duplicate_metadata(diff.after)]


CONDITIONS: dict[str, Callable[[GraphDiff], list[str]]] = {
    "added": _added,
    "removed": _removed,
    "shape": _with_change("shape"),
    "dtype": _with_change("dtype"),
    "duplicate-metadata": _duplicates,
}


def failures(diff: GraphDiff, fail_on: Iterable[str] | None, expect: dict[str, Any] | None) -> list[str]:
    """Why the gate is closed, one line each; empty where it is open.

    Any difference closes it, unless `fail_on` names conditions or `expect` is the summary that the diff must have.
    Raises UnknownName for a condition that is not known.
    """
    found = []
    if expect is not None and (summary := diff.summary()) != expect:
        wanted, got = (json.dumps(side, indent=1, sort_keys=True).splitlines() for side in (expect, summary))
        found += list(difflib.unified_diff(wanted, got, "expected", "found", lineterm=""))
    for name in fail_on or ():
        if name not in CONDITIONS:
            raise UnknownName("condition", name, CONDITIONS)
        if names := CONDITIONS[name](diff):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{name}: {', '.join(names[:3])}{more}")
    if fail_on is None and expect is None and not diff.is_empty:
        found.append("the graphs differ")
    return found


@dataclass(frozen=True)
class Source:
    """A file of a graph: a snapshot or an exported program, or a trace and the stage of it that is meant."""

    path: Path
    graph: Snapshot | Trace
    stage: int = -1

    @staticmethod
    def read(text: str) -> Source:
        """`graph.json`, `trace.json`, `trace.json@share_metadata` or `program.pt2`.

        Raises OptionError for a file that is none of them, UnknownName for a stage that a trace does not have.
        """
        path, _, stage = text.rpartition("@") if "@" in text and not Path(text).exists() else (text, "", "")
        graph = _read_graph(Path(path))
        if not stage:
            return Source(Path(path), graph)
        if isinstance(graph, Trace):
            return Source(Path(path), graph, graph.index(stage))
        raise OptionError(f"{path} has no stages, being one graph", fix=f"leave out @{stage}")

    @property
    def snapshot(self) -> Snapshot:
        """The graph that is meant."""
        return self.graph if isinstance(self.graph, Snapshot) else self.graph.stages[self.stage].snapshot


def _read_graph(path: Path) -> Snapshot | Trace:
    try:
        if path.suffix == ".pt2":
            import torch

            return Snapshot.of(torch.export.load(path).module(check_guards=False), path.stem)
        data = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # an archive that is damaged can fail in any way
        raise OptionError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema == TRACE_SCHEMA:
        return Trace.from_json(data)
    if schema == SCHEMA:
        return Snapshot.from_json(data)
    raise OptionError(
        f"{path} is not a saved graph", fix="save one with Snapshot.of(gm).save(path) or torch.export.save"
    )


def compare(before: Source, after: Source | None, ignore: Iterable[str] = ()) -> GraphDiff:
    """By exact links where both are of one trace. Raises OptionError where one graph is to be compared with nothing."""
    if after is None and isinstance(before.graph, Trace):
        return before.graph.diff(ignore=ignore)
    if after is None:
        raise OptionError(f"{before.path} is one graph", fix="name another one to compare it with, or a trace")
    if isinstance(before.graph, Trace) and before.path == after.path:
        return before.graph.diff(before.stage, after.stage, ignore)
    return GraphDiff.of(before.snapshot, after.snapshot, ignore=ignore)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `autodeploy diff`."""
    parser.add_argument(
        "before", help="a saved snapshot or trace (.json), a stage of one (.json@STAGE), or an exported program (.pt2)"
    )
    parser.add_argument(
        "after", nargs="?", help="the same; may be left out after a trace, which then is shown as it is"
    )
    parser.add_argument(
        "--fail-on", type=_names, metavar="LIST", help=f"of {','.join(CONDITIONS)}; any difference fails by default"
    )
    parser.add_argument(
        "--expect", type=Path, metavar="FILE", help="the summary that the difference must have, as JSON"
    )
    parser.add_argument("--ignore", type=_names, default=[], metavar="LIST", help=f"of {','.join(IGNORABLE)}")
    parser.add_argument(
        "--save",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"write {', '.join(WRITERS)} (repeatable)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at the difference")
    parser.add_argument("--summary", action="store_true", help="print the summary as JSON, to be kept for --expect")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def run(args: argparse.Namespace) -> int:
    """`autodeploy diff`: 0 where the gate is open; 1, with the reasons on stderr, where it is closed.

    Raises OptionError or UnknownName for what cannot be read or is not known.
    """
    before, after = Source.read(args.before), Source.read(args.after) if args.after else None
    diff = compare(before, after, args.ignore)
    expect = _read_summary(args.expect) if args.expect else None
    found = failures(diff, args.fail_on, expect)
    if args.summary:
        print(json.dumps(diff.summary(), indent=1))
    elif not diff.is_empty:
        print_diff(diff, sys.stdout)
    shown = before.graph if isinstance(before.graph, Trace) and after is None else diff
    for path in (*args.save, *([args.html] if args.html else [])):
        shown.save(path)
    if after is None and args.fail_on is None and expect is None:
        return 0  # looking at what passes did is no check
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read {path}: {error}", fix="write it with --summary") from error
