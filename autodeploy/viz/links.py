"""How two snapshots belong together: which node became which. Made by a trace, exactly, or by the matcher."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Links:
    """Ids of `before` to ids of `after`.

    `pairs`: the same node on both sides, with the stage that said so. `merged`: a node that was dropped because another
    one computes the same. `into`: the nodes that the users of a dropped node read instead.
    """

    pairs: dict[int, int] = field(default_factory=dict)
    stages: dict[int, str] = field(default_factory=dict)
    merged: dict[int, int] = field(default_factory=dict)
    into: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def pair(self, before: int, after: int, stage: str) -> None:
        """Say that `before` and `after` are the same node."""
        self.pairs[before] = after
        self.stages[before] = stage

    def images(self, before: int) -> tuple[int, ...]:
        """The nodes that stand where `before` stood."""
        if before in self.pairs:
            return (self.pairs[before],)
        return (self.merged[before],) if before in self.merged else self.into.get(before, ())
