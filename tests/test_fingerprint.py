"""Hashes of values: by what they mean, whatever process they are in; code of users by what runs."""

from __future__ import annotations

import dis
import enum
import inspect
import os
import threading
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensor_forms import on_another_device, plain
from torch import nn

import autodeploy as ad
from autodeploy.graph.aliasing import Writes
from autodeploy.graph.effects import autocast_change
from autodeploy.inductor import fingerprint
from autodeploy.inductor.fingerprint import Fingerprint, NotHashable, has_installed_code
from passes import ShareMetadata, default

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


def test_tensors_are_told_apart_by_more_than_their_bytes() -> None:
    forms = plain("part of its memory", "another part")  # which Python code cannot tell apart by accident
    assert len({Fingerprint(value).hexdigest() for value in forms.values()}) == len(forms)
    one, other = torch.zeros(2), torch.zeros(2)
    with on_another_device(other):
        assert Fingerprint(one).hexdigest() != Fingerprint(other).hexdigest()


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


def imports_when_it_runs(statement: str, inside: str) -> Any:
    """A user's function with that import, `inside` of what it does."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(f"def run():\n {inside.format(statement)}", names)
    return names["run"]


LATE = ["import spans", "from spans import FULL", "import spans.x as y", "from . import x"]
INSIDE = ["{}", "class Inner:\n  {}", "def inner():\n  {}"]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("statement", LATE)
def test_what_a_function_of_a_user_imports_late_is_refused(statement: str, inside: str) -> None:
    """Another file decides then what it does."""
    with pytest.raises(NotHashable, match=r"imports .* when it runs"):
        Fingerprint(imports_when_it_runs(statement, inside))
    Fingerprint(imports_when_it_runs("import json, torch.nn; from autodeploy import extend", inside))


def made_here() -> Any:
    return lambda: 0


@dataclass
class Point:
    x: int


INSTALLED = [dis.dis, os.path.join, torch.compile, pytest.fixture, ad.trace, default, autocast_change]
INSTALLED += [ShareMetadata.__eq__, Writes.__new__, inspect.FullArgSpec.__new__]


@pytest.mark.parametrize("function", INSTALLED, ids=lambda function: function.__qualname__)
def test_code_of_libraries_and_our_own_is_installed(function: Any) -> None:
    """Under any name, and what dataclasses and named tuples of theirs have written."""
    assert has_installed_code(function)


def test_a_distribution_may_keep_what_depends_on_the_platform_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: f"/{name}" for name in fingerprint.sysconfig.get_path_names()}
    monkeypatch.setattr(fingerprint.sysconfig, "get_paths", lambda: folders)
    roots = fingerprint._roots.__wrapped__()
    assert {root.strip("/") for root in roots} == {"stdlib", "platstdlib", "purelib", "platlib"}


@pytest.mark.parametrize("function", [made_here, made_here(), Point.__init__, pass_without_a_file("return 0").apply])
def test_code_of_a_user_is_not(function: Any) -> None:
    assert not has_installed_code(function)
