"""What became of every node between two graphs, as data: entries, folded blocks, counts, and the metadata's story."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from autodeploy.viz.changes import Change
from autodeploy.viz.classify import KINDS, Entry
from autodeploy.viz.fold import Block, fold
from autodeploy.viz.snapshot import Snapshot, checked
from autodeploy.viz.story import Story, tell

SCHEMA = "autodeploy.diff/1"


@dataclass(frozen=True, repr=False)
class Difference:
    """What became of every node of `before`, and where every node of `after` came from."""

    before: Snapshot
    after: Snapshot
    entries: tuple[Entry, ...]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.headline()})"

    def headline(self) -> str:
        """`a -> b: 14 -> 20 nodes (11 unchanged, 3 replaced)`"""
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts.items() if number)
        sizes = f"{len(self.before.nodes)} -> {len(self.after.nodes)} nodes"
        return f"{self.before.title or 'before'} -> {self.after.title or 'after'}: {sizes} ({counts})"

    @property
    def is_empty(self) -> bool:
        """Whether nothing differs."""
        return not self.changed

    @cached_property
    def changed(self) -> tuple[Entry, ...]:
        """The entries that are not unchanged."""
        return tuple(entry for entry in self.entries if entry.kind != "unchanged")

    @cached_property
    def counts(self) -> dict[str, int]:
        """Nodes by what became of them, the one count that is shown: those of `before`, but for what was added.

        A group that was replaced counts by what went, a merger by its duplicates.
        """
        counts: dict[str, int] = Counter(dict.fromkeys(KINDS, 0))
        for entry in self.entries:
            counts[entry.kind] += max(1, len(entry.before))
        return dict(counts)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The differences by module, equal ones of repeated layers as one."""
        return fold(self.before, self.after, self.changed)

    @cached_property
    def story(self) -> Story | None:
        """What became of the metadata, None where this is not the step that shares it."""
        return tell(self.before, self.after, self.entries)

    def summary(self) -> dict[str, Any]:
        """`counts`, and the folded lines."""
        return {
            "before": len(self.before.nodes),
            "after": len(self.after.nodes),
            "kinds": self.counts,
            "lines": self.lines(),
        }

    def lines(self) -> list[str]:
        """One line for each difference, equal ones of repeated layers as one."""
        return [line for block in self.blocks for line in block.lines()]

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

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` wrote. Raises OptionError for anything else."""
        with checked(data, SCHEMA):
            before, after = Snapshot.from_json(data["before"]), Snapshot.from_json(data["after"])
            return cls(before, after, tuple(map(_entry_from_json, data["entries"])))


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": entry.kind, "before": list(entry.before), "after": list(entry.after)}
    if entry.changes:
        data["changes"] = [[change.what, change.before, change.after] for change in entry.changes]
    return data | ({"stage": entry.stage} if entry.stage else {})


def _entry_from_json(data: dict[str, Any]) -> Entry:
    changes = tuple(Change(*change) for change in data.get("changes", ()))
    return Entry(data["kind"], tuple(data["before"]), tuple(data["after"]), changes, data.get("stage", ""))
