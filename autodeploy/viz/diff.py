"""The difference of two graphs: computed once, then printed, drawn, saved or checked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from autodeploy.errors import OptionError, UnknownName
from autodeploy.viz.changes import IGNORABLE, Change
from autodeploy.viz.classify import KINDS, Entry, classify
from autodeploy.viz.fold import Block, fold
from autodeploy.viz.infer import infer_fates
from autodeploy.viz.links import Links
from autodeploy.viz.match import match
from autodeploy.viz.pause import collector_paused
from autodeploy.viz.snapshot import Snapshot, checked
from autodeploy.viz.story import Story, tell

if TYPE_CHECKING:
    import networkx

SCHEMA = "autodeploy.diff/1"


@dataclass(frozen=True)
class GraphDiff:
    """What became of every node of `before`, and where every node of `after` came from."""

    before: Snapshot
    after: Snapshot
    entries: tuple[Entry, ...]

    @staticmethod
    def of(
        before: Snapshot | fx.GraphModule,
        after: Snapshot | fx.GraphModule,
        *,
        manual: Mapping[str, str] | None = None,
        links: Links | None = None,
        ignore: Iterable[str] = (),
    ) -> GraphDiff:
        """Compare two graphs, matching their nodes unless `links` are given.

        `manual` pairs names of `before` with names of `after`. `ignore` leaves out differences of "names", "order",
        "device" or "meta" (module path and role). Raises UnknownName and OptionError for other names.
        """
        ignore = list(ignore)
        for name in ignore:
            if name not in IGNORABLE:
                raise UnknownName("thing to ignore", name, IGNORABLE)
        one = before if isinstance(before, Snapshot) else Snapshot.of(before, "before")
        other = after if isinstance(after, Snapshot) else Snapshot.of(after, "after")
        with collector_paused():
            if links is None:
                links = match(one, other, manual)
                infer_fates(one, other, links)
            return GraphDiff(one, other, classify(one, other, links, ignore))

    @property
    def is_empty(self) -> bool:
        """Whether nothing differs."""
        return all(entry.kind == "unchanged" for entry in self.entries)

    @cached_property
    def changed(self) -> tuple[Entry, ...]:
        """The entries that are not unchanged."""
        return tuple(entry for entry in self.entries if entry.kind != "unchanged")

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The differences by module, equal ones of repeated layers as one."""
        return fold(self.before, self.after, self.changed)

    @cached_property
    def story(self) -> Story | None:
        """What became of the metadata, None where no graph has a prepare_metadata node."""
        return tell(self.before, self.after, self.entries)

    def summary(self) -> dict[str, Any]:
        """Counts by kind (for a group or merger, of the nodes that went and came), and the folded lines."""
        counts: dict[str, int] = Counter(dict.fromkeys(KINDS, 0))
        for entry in self.entries:
            counts[entry.kind] += max(1, len(entry.before))
        return {
            "before": len(self.before.nodes),
            "after": len(self.after.nodes),
            "kinds": dict(counts),
            "lines": self.lines(),
        }

    def lines(self) -> list[str]:
        """One line for each difference, equal ones of repeated layers as one."""
        return [line for block in self.blocks for line in block.lines()]

    def __str__(self) -> str:
        from autodeploy.viz.text import render

        return render(self)

    def _repr_html_(self) -> str:
        from autodeploy.viz.svg import draw

        return draw(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data with a versioned schema, in a stable order. Blocks, summary and story are there to be read:
        `from_json` computes them again.
        """
        return {
            "schema": SCHEMA,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "entries": [_entry_to_json(entry) for entry in self.entries],
            "blocks": [block.to_json() for block in self.blocks],
            "summary": self.summary(),
            "story": asdict(self.story) if self.story else None,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> GraphDiff:
        """What `to_json` wrote. Raises OptionError for anything else."""
        with checked(data, SCHEMA):
            before, after = Snapshot.from_json(data["before"]), Snapshot.from_json(data["after"])
            return GraphDiff(before, after, tuple(map(_entry_from_json, data["entries"])))

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Both graphs in one: see `autodeploy.viz.union`."""
        from autodeploy.viz.union import union

        return union(self)

    def save(self, path: str | Path) -> None:
        """Write .html, .txt, .json, .svg, .dot, or .me.json (Model Explorer). Raises OptionError for other endings."""
        path = Path(path)
        for ending, write in _writers().items():
            if path.name.endswith(ending):
                path.write_text(write(self), encoding="utf-8")
                return
        raise OptionError(f"cannot save a diff as {path.name!r}", fix=f"end it with {', '.join(_writers())}")


def _writers() -> dict[str, Callable[[GraphDiff], str]]:
    from autodeploy.viz import export
    from autodeploy.viz.page import render_page
    from autodeploy.viz.svg import draw

    return {
        ".html": render_page,
        ".me.json": lambda diff: json.dumps(export.to_model_explorer(diff), indent=1),
        ".json": lambda diff: json.dumps(diff.to_json(), indent=1),
        ".txt": lambda diff: f"{diff}\n",
        ".svg": draw,
        ".dot": export.to_dot,
    }


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": entry.kind, "before": list(entry.before), "after": list(entry.after)}
    if entry.changes:
        data["changes"] = [[change.what, change.before, change.after] for change in entry.changes]
    return data | ({"stage": entry.stage} if entry.stage else {})


def _entry_from_json(data: dict[str, Any]) -> Entry:
    changes = tuple(Change(*change) for change in data.get("changes", ()))
    return Entry(data["kind"], tuple(data["before"]), tuple(data["after"]), changes, data.get("stage", ""))
