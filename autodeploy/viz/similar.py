"""The matcher's last stage: nodes of one module that do the same op with other arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import product

from autodeploy.viz.links import Links
from autodeploy.viz.side import Side

ENOUGH = 0.5  # of inputs, users and name
ENOUGH_ALONE = 0.25  # for the only two of their op in a module: more than the name
MOST = 10_000  # comparisons of one op in one module; beyond, alikeness says little


def pair_similar(before: Side, after: Side, links: Links, pair: Callable[[int, int, str], None]) -> bool:
    """Pair what is left, the most alike first, within one module and op; returns whether any were."""
    place, other_place = before.snapshot.position, after.snapshot.position
    candidates = []
    others = _by_kind(after)
    for kind, ids in _by_kind(before).items():
        found = others.get(kind, [])
        enough = ENOUGH_ALONE if len(ids) == len(found) == 1 else ENOUGH
        if len(ids) * len(found) > MOST:
            continue
        for one, other in product(ids, found):
            alikeness = _alikeness(before, after, links, one, other)
            if alikeness >= enough:
                candidates.append((-alikeness, place[one], other_place[other], one, other))
    any_paired = False
    for *_, one, other in sorted(candidates):
        if one in before.left and other in after.left:
            pair(one, other, "similar")
            any_paired = True
    return any_paired


def _by_kind(side: Side) -> dict[Hashable, list[int]]:
    kinds: dict[Hashable, list[int]] = {}
    for id in side.left:
        node = side.snapshot.by_id[id]
        kinds.setdefault((node.module, node.op, node.short_target), []).append(id)
    return kinds


def _alikeness(before: Side, after: Side, links: Links, one: int, other: int) -> float:
    """Between 0 and 1: how much of inputs, users and base name is the same."""
    inputs = _shared(dict(before.inputs[one]), dict(after.inputs[other]), links)
    users = {(place, links.pairs.get(user)) for place, user in before.users[one]}
    reached = set(after.users[other])
    used = len(users & reached) / max(len(users), len(reached), 1)
    names = [side.snapshot.name_of(id).rstrip("0123456789_") for side, id in ((before, one), (after, other))]
    return 0.4 * inputs + 0.4 * used + 0.2 * (names[0] == names[1])


def _shared(ones: dict[str, int], others: dict[str, int], links: Links) -> float:
    same = sum(1 for place, id in ones.items() if place in others and links.pairs.get(id) == others[place])
    return same / max(len(ones), len(others), 1)
