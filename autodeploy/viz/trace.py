"""The history of a graph through a pipeline, to be looked at, saved and compared step by step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from autodeploy.viz.diff import GraphDiff
from autodeploy.viz.history import History
from autodeploy.viz.page import render_frame, render_page
from autodeploy.viz.save import as_json, write
from autodeploy.viz.story import Story
from autodeploy.viz.svg import draw

WRITERS = {".html": render_page, ".json": as_json, ".txt": lambda trace: f"{trace}\n", ".svg": draw}


class Trace(History):
    """A `History` that can be compared, printed and saved."""

    def diff(self, first: int | str = 0, last: int | str = -1, ignore: Iterable[str] = ()) -> GraphDiff:
        """What the passes after stage `first` did up to stage `last`, by exact links; stages by number or name.

        Raises UnknownName for a name that no stage has.
        """
        found = self.between(self.index(first), self.index(last), ignore)
        return GraphDiff(found.before, found.after, found.entries)

    @cached_property
    def story(self) -> Story | None:
        """What became of the metadata in the pass that made prepare_metadata, None where no pass did."""
        pairs = range(len(self.stages) - 1)
        return next((told for first in pairs if (told := self.diff(first, first + 1).story)), None)

    def __str__(self) -> str:
        steps = range(len(self.stages) - 1)
        return "\n".join(self.diff(index, index + 1).headline() for index in steps)

    def save(self, path: str | Path) -> None:
        """Write a page (.html), the headlines of all steps (.txt), a picture (.svg) of the step that shares metadata or
        else of all passes, or what `autodeploy diff` opens (.json). Raises OptionError for other endings.
        """
        write(path, self, WRITERS)

    def _repr_html_(self) -> str:
        return render_frame(self)
