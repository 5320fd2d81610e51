"""See what a compiler did to a graph: snapshots, exact history, and computed differences of FX graphs."""

from autodeploy.viz.diff import GraphDiff
from autodeploy.viz.gate import assert_graph_diff
from autodeploy.viz.history import Stage
from autodeploy.viz.provenance import Recorder
from autodeploy.viz.snapshot import Snapshot
from autodeploy.viz.trace import Trace

__all__ = ["GraphDiff", "Recorder", "Snapshot", "Stage", "Trace", "assert_graph_diff"]
