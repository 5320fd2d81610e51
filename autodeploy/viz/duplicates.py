"""Finds metadata that is computed more than once: equal nodes that depend on the layout, sizes and constants alone."""

from __future__ import annotations

from autodeploy.viz.side import Side, merkle
from autodeploy.viz.snapshot import Snapshot

_SIZES = ("aten.sym_size.int", "aten.sym_numel.default")
_LITTLE = ("operator.getitem", "builtins.getattr")  # unpacking, not computing


def duplicate_metadata(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """Names of nodes that compute the same from inputs of the role "layout", for each set of two or more."""
    side = Side(snapshot)
    known = _layout_only(snapshot, side)
    below, _ = merkle(side)
    groups: dict[object, list[str]] = {}
    for id in side.order:
        node = snapshot.by_id[id]
        if id in known and not node.free and node.target not in _LITTLE:
            groups.setdefault(below[id], []).append(node.name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _layout_only(snapshot: Snapshot, side: Side) -> set[int]:
    known: set[int] = set()
    for id in side.order:
        node = snapshot.by_id[id]
        inputs = [source for _, source in snapshot.inputs[id]]
        if node.op == "placeholder" and not inputs and id not in snapshot.source_of:
            is_known = node.role == "layout"
        elif id in snapshot.source_of:
            is_known = snapshot.source_of[id] in known
        elif node.op == "get_attr":
            is_known = node.role == "constant"
        else:
            is_known = node.target in _SIZES or (bool(inputs) and all(source in known for source in inputs))
        if is_known and node.op != "output":
            known.add(id)
    return known
