"""The invariants of a graph between passes, as checks: each returns None or raises InvariantError."""

from __future__ import annotations

from torch import fx

from autodeploy.dependence import Split
from autodeploy.errors import InvariantError, node_location
from autodeploy.graph import PREPARE, SITE, prepare_nodes


def check(gm: fx.GraphModule, parts: Split) -> None:
    """Every invariant that holds for the stage `gm` is in; those of a later stage are vacuous.

    `parts` is `dependence.split(gm)`. Raises InvariantError naming the node.
    """
    prepares = prepare_nodes(gm)
    if not prepares:
        return
    check_one_prepare(prepares)
    check_prepare_is_first(prepares[0], parts)
    check_nothing_left_outside(parts)
    check_reads_come_from_prepare(gm, prepares[0], parts)


def check_one_prepare(prepares: list[fx.Node]) -> None:
    """Exactly one prepare_metadata node."""
    if len(prepares) != 1:
        raise InvariantError(f"{len(prepares)} {PREPARE} nodes instead of one", where=node_location(prepares[1]))


def check_prepare_is_first(prepare: fx.Node, parts: Split) -> None:
    """It comes right after the inputs; nothing but sizes, which are free, stands between."""
    node = prepare.prev
    while node.op != "root":
        if node.op not in ("placeholder", "get_attr") and node not in parts.scalars:
            raise InvariantError(f"{PREPARE} does not come right after the inputs", where=node_location(node))
        node = node.prev


def check_nothing_left_outside(parts: Split) -> None:
    """No layout-only computation is left outside."""
    left = parts.metadata
    if left:
        raise InvariantError(
            f"{len(left)} layout-only nodes outside {PREPARE}, such as {left[0].format_node()}",
            where=node_location(left[0]),
        )


def check_reads_come_from_prepare(gm: fx.GraphModule, prepare: fx.Node, parts: Split) -> None:
    """Every cached attention node reads metadata only from prepare_metadata or from graph inputs."""
    for node in gm.graph.nodes:
        if SITE not in node.meta:
            continue
        for arg in node.all_input_nodes:
            is_computed = arg in parts.known and arg.op == "call_function" and arg not in parts.scalars
            if is_computed and arg.all_input_nodes != [prepare]:
                raise InvariantError(
                    f"attention reads {arg.name}, which is not an output of {PREPARE}", where=node_location(node)
                )
