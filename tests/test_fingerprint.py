"""Hashes of values: by what they mean, whatever process they are in; code of users by what runs."""

from __future__ import annotations

import enum
import threading
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from autodeploy.inductor.fingerprint import Fingerprint, NotHashable

FACTOR = 3.0


class Mine:
    """Stands for a third party's backend: state, and code that reads a global."""

    name, kind = "mine", "attention"

    def __init__(self, block: int) -> None:
        self.block = block

    def call(self, value: float) -> float:
        return value * FACTOR


def pass_without_a_file(source: str) -> Any:
    names: dict[str, Any] = {"dataclass": dataclass, "LIMIT": 4, "__name__": "__main__"}
    exec(f"@dataclass(frozen=True)\nclass Step:\n size: int = 1\n def apply(self, gm):\n  {source}", names)
    return names["Step"]


@pytest.mark.parametrize("edited", ["return LIMIT", "return 1", "return lambda: 0", "return 0.0", "return -0.0"])
def test_a_pass_edited_in_a_notebook_is_another(edited: str) -> None:
    step = pass_without_a_file("return 0")
    assert Fingerprint(step()).hexdigest() == Fingerprint(pass_without_a_file("return 0")()).hexdigest()
    assert Fingerprint(step()).hexdigest() != Fingerprint(step(size=2)).hexdigest()
    assert Fingerprint(step()).hexdigest() != Fingerprint(pass_without_a_file(edited)()).hexdigest()


def test_state_and_globals_of_a_provider_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [Fingerprint(Mine(block)).hexdigest() for block in (16, 32)]
    assert len(set(before)) == 2
    monkeypatch.setitem(globals(), "FACTOR", 4.0)
    assert Fingerprint(Mine(16)).hexdigest() not in before


class Named:
    """Pickled by the name of a global."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


class Odd(torch.Tensor):
    pass


class Colour(enum.Enum):
    RED = 1


VALUES = [
    *(0, 0.0, -0.0, 0j, complex(0.0, -0.0), False, None, "", b"", (), [], {}, set(), frozenset(), ..., "0", b"0"),
    *((0,), ((0,),), (0, 0), [0], {0: 1}, {1: 0}, {0}, range(2), slice(0, 2), slice(0, 2, 1), Colour.RED, Colour),
    *(torch.float32, torch.float64, torch.device("cpu"), torch.device("meta"), torch.tensor(0.0), torch.tensor(-0.0)),
    *(torch.tensor([0.0]), torch.tensor(0), torch.zeros(2, 3), torch.zeros(3, 2).t(), torch.ops.aten.add.Tensor),
    *(float("nan"), float("inf"), len, max, Mine(1), Mine(2), Mine(1).call, [Mine(1)] * 2, nn.Linear, types),
    *(Named("ONE"), Named("OTHER"), torch.ops.higher_order.cond, torch.ops.higher_order.scan),
]


def test_different_values_have_different_hashes() -> None:
    assert len({Fingerprint(value).hexdigest() for value in VALUES}) == len(VALUES)


@pytest.mark.parametrize("value", [threading.Lock(), (x for x in ()), torch.zeros(1, device="meta"), Odd(1)])
def test_what_cannot_be_hashed_is_refused(value: object) -> None:
    for holder in (value, [value], Mine(value)):  # type: ignore[arg-type]
        with pytest.raises(NotHashable):
            Fingerprint(holder)


def test_what_holds_itself_is_hashed() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    other: list[Any] = [1, [1]]
    other[1].append(other)
    assert Fingerprint(ring).hexdigest() != Fingerprint(other).hexdigest()
