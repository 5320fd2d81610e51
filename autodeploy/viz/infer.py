"""What became of the nodes that have no partner, judged by what their users read now."""

from __future__ import annotations

from autodeploy.viz.links import Links
from autodeploy.viz.side import Side, merkle
from autodeploy.viz.snapshot import Snapshot


def infer_fates(before: Snapshot, after: Snapshot, links: Links) -> None:
    """Fill `links.into` and `links.merged` for nodes of `before` that no link says anything of.

    A node was merged where a twin, equal down to the inputs, lives on and users of the node now read the twin.
    """
    reads = {id: dict(inputs) for id, inputs in after.inputs.items()}
    side = Side(before)
    below, _ = merkle(side)
    twins = {below[id]: id for id in reversed(side.order) if id in links.pairs}
    for id in reversed(side.order):
        if id in links.pairs or id in links.merged or id in links.into:
            continue
        users = [(place, user) for place, user in before.users[id] if user in links.pairs]
        now = [reads[links.pairs[user]].get(place) for place, user in users]
        twin = twins.get(below[id])
        if twin is not None and _reads_twin(links, before, id, links.pairs[twin], now):
            links.merged[id] = links.pairs[twin]
        elif found := tuple(dict.fromkeys(new for new in now if new is not None)):
            links.into[id] = found


def _reads_twin(links: Links, before: Snapshot, id: int, twin: int, now: list[int | None]) -> bool:
    if now:
        return twin in now
    return any(user in links.merged for _, user in before.users[id])
