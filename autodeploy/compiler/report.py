"""What the passes did to one graph, as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from torch import fx

from autodeploy.compiler.pipeline import Counts, NearMiss, PassRecord
from autodeploy.errors import OptionError
from autodeploy.graph.edit import placeholders
from autodeploy.graph.meta import SITE
from autodeploy.graph.sizes import NO_BYTES, Bytes, bytes_of
from autodeploy.graph.values import tensors
from autodeploy.viz import Trace
from autodeploy.viz.table import table

_SENT = ("tokens", "layout")  # roles of inputs that are new in every step; weights and caches are not


@dataclass(frozen=True)
class Ledger:
    """The price of metadata: layout-only tensor nodes as a naive per-layer graph has them, and as they are now.

    A node is one field or one torch op. `attention_nodes` counts every cached attention-like node. `bytes_naive` and
    `bytes_shared` are what metadata nodes write in a step, `bytes_sent` what the host sends: the packed inputs.
    """

    attention_nodes: int
    nodes_naive: int
    nodes_shared: int
    ops_naive: int
    ops_shared: int
    prepare_calls: int
    bytes_naive: Bytes = NO_BYTES
    bytes_shared: Bytes = NO_BYTES
    bytes_sent: Bytes = NO_BYTES


@dataclass(frozen=True, repr=False)
class Report:
    """The records of one run of the pipeline. `trace_seconds` is 0 where the graph came from elsewhere.

    `graph` names a graph that torch.compile handed to our backend; empty for a traced model. `trace` is the graph after
    each pass, None where nobody recorded it.
    """

    passes: tuple[PassRecord, ...]
    ledger: Ledger
    trace_seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())
    graph: str = ""
    trace: Trace | None = field(default=None, compare=False)

    @staticmethod
    def of(
        records: Sequence[PassRecord],
        gm: fx.GraphModule,
        trace_seconds: float = 0.0,
        graph: str = "",
        trace: Trace | None = None,
    ) -> Report:
        """The report of a run that ended in `gm`."""
        return Report(tuple(records), _ledger(records, gm), trace_seconds, graph=graph, trace=trace)

    @staticmethod
    def without_passes(graph: str, reason: str) -> Report:
        """The report of a graph that no pass ran on."""
        return Report((), Ledger(0, 0, 0, 0, 0, 0), notes=(f"no pass ran: {reason}",), graph=graph)

    @property
    def seconds(self) -> float:
        """Time of all passes together."""
        return sum(record.seconds for record in self.passes)

    def __repr__(self) -> str:
        ledger = self.ledger
        graph = f"graph {self.graph}, " if self.graph else ""
        metadata = f"metadata {ledger.nodes_naive} -> {ledger.nodes_shared} nodes"
        return f"Report({graph}{len(self.passes)} passes in {self.seconds:.2f} s, {metadata})"

    def _repr_html_(self) -> str:
        page = "" if self.trace is None else self.trace._repr_html_()
        return f"<pre>{escape(str(self))}</pre>{page}"

    def save(self, path: str | Path) -> None:
        """Write the table (.txt), or of what was recorded a page (.html), a picture (.svg), or what `autodeploy diff`
        opens (.json). Raises OptionError for other endings, and where nothing was recorded.
        """
        if Path(path).suffix == ".txt":
            Path(path).write_text(f"{self}\n", encoding="utf-8")
        elif self.trace is not None:
            self.trace.save(path)
        else:
            raise OptionError(
                f"nothing was recorded to be saved as {Path(path).name!r}",
                fix="apply(gm, recorder=Recorder()), or torch.compile(..., options={'record': True})",
            )

    def __str__(self) -> str:
        lines = [f"torch.compile graph {self.graph}"] if self.graph else []
        if self.passes:
            ledger = _foreign_ledger_lines(self) if self.graph else _ledger_lines(self.ledger)
            lines += [*_pass_table(self), "", *ledger]
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        data = asdict(replace(self, trace=None))
        del data["trace"]  # which has a file of its own
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """The report that `to_json` wrote."""
        parsed = {
            "passes": tuple(map(_record, data["passes"])),
            "ledger": Ledger(**{key: _bytes(value) for key, value in data["ledger"].items()}),
            "notes": tuple(data["notes"]),
        }
        return Report(**{**data, **parsed})


def _record(data: dict[str, Any]) -> PassRecord:
    misses = tuple(NearMiss(**miss) for miss in data["near_misses"])
    return PassRecord(
        **{**data, "near_misses": misses, "before": _counts(data["before"]), "after": _counts(data["after"])}
    )


def _counts(data: dict[str, Any]) -> Counts:
    return Counts(**{key: _bytes(value) for key, value in data.items()})


def _bytes(value: Any) -> Any:
    return Bytes(**value) if isinstance(value, dict) else value


def _ledger(records: Sequence[PassRecord], gm: fx.GraphModule) -> Ledger:
    """Metadata is at its naive worst before it is shared, and at its fewest nodes right after."""
    stages = [records[0].before, *(record.after for record in records)] if records else [Counts(0, 0, 0, 0)]
    first_shared = next((index for index, stage in enumerate(stages) if stage.prepare_calls), len(stages) - 1)
    naive = max(stages[: max(1, first_shared)], key=lambda stage: (stage.metadata_nodes, stage.metadata_ops))
    return Ledger(
        attention_nodes=len({SITE.of(node).path for node in gm.graph.nodes if SITE.on(node)}),
        nodes_naive=naive.metadata_nodes,
        nodes_shared=stages[first_shared].metadata_nodes,
        ops_naive=naive.metadata_ops,
        ops_shared=stages[-1].metadata_ops,
        prepare_calls=stages[-1].prepare_calls,
        bytes_naive=naive.metadata_bytes,
        bytes_shared=stages[first_shared].metadata_bytes,
        bytes_sent=bytes_of(tensor for role in _SENT for node in placeholders(gm, role) for tensor in tensors(node)),
    )


def _pass_table(report: Report) -> list[str]:
    rows: list[Sequence[str]] = [("pass", "matches", "nodes", "metadata nodes", "ms")]
    if report.trace_seconds:
        rows.append(("(trace)", "", "", "", f"{report.trace_seconds * 1e3:.0f}"))
    for record in report.passes:
        nodes = f"{record.before.nodes} -> {record.after.nodes}"
        metadata = str(record.after.metadata_nodes)
        rows.append((record.name, str(record.matches), nodes, metadata, f"{record.seconds * 1e3:.1f}"))
    rows.append(("all passes", "", "", "", f"{report.seconds * 1e3:.1f}"))
    share = [f"{report.seconds / report.trace_seconds:.1%} of the time of tracing"] if report.trace_seconds else []
    return (
        table(rows, right=True)
        + share
        + [line for record in report.passes for line in near_miss_lines(record.name, record.near_misses)]
    )


def near_miss_lines(name: str, misses: Sequence[NearMiss]) -> list[str]:
    """One line for each reason, with the first node that the pass `name` gave it for."""
    first: dict[str, str] = {}
    for miss in misses:
        first.setdefault(miss.reason, miss.where)
    counts = Counter(miss.reason for miss in misses)
    return [
        f"  near miss in {name}: {f'{counts[reason]} x ' if counts[reason] > 1 else ''}{reason} ({where})"
        for reason, where in first.items()
    ]


def _ledger_lines(ledger: Ledger) -> list[str]:
    rows = [
        ("metadata", "naive, per layer", "shared"),
        ("field and op nodes", str(ledger.nodes_naive), str(ledger.nodes_shared)),
        ("torch ops, fields written out", str(ledger.ops_naive), str(ledger.ops_shared)),
        ("prepare_metadata nodes", "-", str(ledger.prepare_calls)),
        ("bytes they write, at the sizes traced", str(ledger.bytes_naive.number), str(ledger.bytes_shared.number)),
    ]
    return [
        f"{ledger.attention_nodes} cached attention nodes",
        *table(rows, right=True),
        f"bytes written, at any size: {ledger.bytes_shared.expression}",
        f"bytes sent: {ledger.bytes_sent.expression}",
    ]


def _foreign_ledger_lines(report: Report) -> list[str]:
    """Where no size is symbolic, all is constant: nothing reads a layout, but duplicates are merged."""
    ledger = report.ledger
    merged = ledger.nodes_naive - ledger.nodes_shared or sum(record.matches for record in report.passes)
    return [f"layout-only nodes: {ledger.nodes_naive} -> {ledger.nodes_shared}, {merged} duplicates merged"]
