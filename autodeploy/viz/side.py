"""What the matcher reads of one snapshot: hashes of nodes, of what is below and above them, and of what is around."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from autodeploy.viz.snapshot import Snapshot


class Side:
    """One of two graphs. `left` are the ids that have no partner yet, in order; `anchor` numbers the pairs there are.

    `order` has every node after those that it reads, also across the borders of called graphs.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.inputs = snapshot.inputs
        self.users = snapshot.users
        self.label: dict[int, Hashable] = {node.id: hash(node.label) for node in snapshot.nodes}
        self.path = {node.id: node.module for node in snapshot.nodes}
        self.left = dict.fromkeys(self.label)
        self.anchor: dict[int, int] = {}
        self.order = _topological(snapshot)
        self.below: dict[int, Hashable] = {}
        self.above: dict[int, Hashable] = {}


def _topological(snapshot: Snapshot) -> list[int]:
    waiting = {id: len(inputs) for id, inputs in snapshot.inputs.items()}
    ready = [id for id, number in waiting.items() if number == 0]
    for id in ready:
        for _, user in snapshot.users.get(id, ()):
            waiting[user] -= 1
            if waiting[user] == 0:
                ready.append(user)
    # A graph that a failed pass left behind may read erased nodes, or have a cycle.
    done = set(ready)
    return ready + [id for id in waiting if id not in done]


def merkle(side: Side) -> tuple[dict[int, Hashable], dict[int, Hashable]]:
    """Hashes that are equal for nodes with equal computations below them, and with equal uses above them."""
    below: dict[int, Hashable] = {}
    above: dict[int, Hashable] = {}
    for id in side.order:
        below[id] = hash((side.label[id], *((place, below.get(arg)) for place, arg in side.inputs[id])))
    for id in reversed(side.order):
        above[id] = hash((side.label[id], _bag((place, above.get(user)) for place, user in side.users[id])))
    return below, above


def refine(side: Side, keys: dict[int, Hashable], hops: int) -> dict[int, Hashable]:
    """`keys` of unpaired nodes, told apart by the keys and pairs up to `hops` edges away."""
    colors: dict[int, Hashable] = {id: ("pair", anchor) for id, anchor in side.anchor.items()} | keys
    for _ in range(hops):
        refined: dict[int, Hashable] = {}
        for id in side.left:
            inputs = tuple((place, colors.get(arg)) for place, arg in side.inputs[id])
            users = _bag((place, colors.get(user)) for place, user in side.users[id])
            refined[id] = hash((colors[id], inputs, users))
        colors |= refined
    return {id: colors[id] for id in side.left}


def _bag(items: Iterable[Hashable]) -> tuple[int, ...]:
    hashes = [hash(item) for item in items]
    return tuple(sorted(hashes)) if len(hashes) > 1 else tuple(hashes)
