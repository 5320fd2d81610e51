"""The difference of two graphs: computed once, then printed, drawn, saved or checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from autodeploy.viz.classify import classify
from autodeploy.viz.difference import Difference
from autodeploy.viz.export import to_dot, to_model_explorer, to_sync_navigation
from autodeploy.viz.infer import infer_fates
from autodeploy.viz.links import Links
from autodeploy.viz.match import match
from autodeploy.viz.page import render_frame, render_page
from autodeploy.viz.pause import collector_paused
from autodeploy.viz.save import as_json, write
from autodeploy.viz.snapshot import Snapshot
from autodeploy.viz.svg import draw
from autodeploy.viz.text import render

if TYPE_CHECKING:
    import networkx

WRITERS = {
    ".html": render_page,
    ".me.json": to_model_explorer,
    ".sync.json": to_sync_navigation,
    ".json": as_json,
    ".txt": lambda diff: f"{diff}\n",
    ".svg": draw,
    ".dot": to_dot,
}


class GraphDiff(Difference):
    """A `Difference` that can be made, printed and saved."""

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
        "device", "wiring" or "meta" (module path and role). Raises UnknownName and OptionError for other names.
        """
        one = before if isinstance(before, Snapshot) else Snapshot.of(before, "before")
        other = after if isinstance(after, Snapshot) else Snapshot.of(after, "after")
        with collector_paused():
            if links is None:
                links = match(one, other, manual)
                infer_fates(one, other, links)
            return GraphDiff(one, other, classify(one, other, links, ignore))

    def __str__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        return render_frame(self)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Both graphs in one: see `autodeploy.viz.union`."""
        from autodeploy.viz.union import union

        return union(self)

    def save(self, path: str | Path) -> None:
        """Write .html, .txt, .json, .svg, .dot, or what Model Explorer opens: both graphs (.me.json), and which node is
        which (.sync.json). Raises OptionError for other endings.
        """
        write(path, self, WRITERS)
