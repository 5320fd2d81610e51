"""The trials can fail: a pass that is broken on purpose is seen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import sharing_facts
import torch
from sharing_check import failure
from sharing_complete import shortcomings
from sharing_facts import lies_in
from sharing_fronts import FRONTS
from sharing_generate import generate
from sharing_trials import quiet
from torch import fx

from autodeploy.graph import aliasing, dependence, effects, equality, outline
from autodeploy.graph.spelling import attribute
from passes import ShareMetadata

_MOST = 2000
_freeze, _key, _impurity = equality._freeze, equality.value_key, effects.impurity


def _without_names(node: fx.Node) -> Any:
    return _key(node) if node.op == "get_attr" or not node.kwargs else (node.target, *map(_freeze, node.args))


def _by_python(value: Any) -> Any:
    return value if type(value) in (bool, int, float, complex) else _freeze(value)


def _by_bits(node: fx.Node) -> Any:
    value = attribute(node)
    return equality._bits(value) if isinstance(value, torch.Tensor) else id(value)


def _never_random(node: fx.Node) -> str | None:
    reason = _impurity(node)
    return None if reason == effects.RANDOM else reason


def _one_name(gm: fx.GraphModule, name: str, value: Any) -> str:
    setattr(gm, name, value)
    return name


class Broken(NamedTuple):
    """What is replaced, and the first program that shows it, where the search begins."""

    where: Any
    what: str
    by: Callable[..., Any]
    first: int = 0
    front: str = "fx"


BROKEN = {
    "arguments by name do not count": Broken(equality, "value_key", _without_names, 50),
    "1, 1.0 and True are one": Broken(equality, "_freeze", _by_python, 370),
    "buffers of equal bits are one": Broken(equality, "_attribute_key", _by_bits),
    "what is returned twice is one": Broken(equality, "returned", lambda graph: set()),
    "writes are not seen": Broken(dependence, "mutated", lambda graph: aliasing.Writes(set(), set())),
    "views are not followed": Broken(aliasing, "aliased", lambda node: []),
    "inputs are apart": Broken(aliasing, "_perhaps_the_same", lambda graph, written: set(), 620),
    "random numbers are pure": Broken(dependence, "impurity", _never_random),
    "regions of autocast are no matter": Broken(dependence, "autocast_change", lambda node: 0, 2160),
    "constants of one name are one": Broken(outline, "_at_home", _one_name, 90, "two pieces"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_pass_is_seen(name: str) -> None:
    broken = BROKEN[name]
    with quiet(), patch.object(broken.where, broken.what, broken.by):
        numbers = itertools.islice(itertools.count(broken.first), _MOST)
        programs = (generate(random.Random(f"0 {number}")) for number in numbers)
        assert any(failure(program, FRONTS[broken.front]) for program in programs)


DENIED: dict[str, tuple[str, Callable[..., Any]]] = {
    "shares memory": ("aliased", lambda node: []),
    "writes to": ("writes", lambda node: []),
    "draws random numbers": ("impurity", lambda node: None),
}


@pytest.mark.parametrize("lie", DENIED)
@pytest.mark.filterwarnings("ignore")
def test_a_denied_fact_is_seen(lie: str) -> None:
    what, denied = DENIED[lie]
    with quiet(), patch.object(sharing_facts, what, denied):
        programs = (generate(random.Random(f"0 {number}")) for number in range(100))
        assert any(lie in found for program in programs for found in lies_in(program))


@pytest.mark.filterwarnings("ignore")
def test_what_is_left_is_seen() -> None:
    with quiet(), patch.object(ShareMetadata, "apply", lambda step, gm: 0):
        assert any(shortcomings(generate(random.Random(f"0 {number}"))) for number in range(20))
