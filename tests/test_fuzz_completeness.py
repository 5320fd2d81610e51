"""`share_metadata` on graphs where the truth is known: each distinct layout-only value is computed once, in one place.

A recipe is a chain of ops on the layout. Copies of a few recipes, each op spelled in any of its equal ways, are mixed
into one graph with activations. What recipes have in common, and no more than that, is what may remain.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from fx_fuzz_root import make_root, ops
from torch import Tensor, fx

from autodeploy.compiler import pipeline
from autodeploy.graph.edit import PREPARE, prepare_nodes
from autodeploy.graph.meta import CONSTANT, ROLE
from passes import ShareMetadata

aten, hop = torch.ops.aten, torch.ops.higher_order
Spelling = Callable[[fx.Graph, fx.Node, int], fx.Node]


class Op(NamedTuple):
    """What a step of a recipe may be: its number of nodes, of different `n`, and the equal ways to write it."""

    num_nodes: int
    num_variants: int
    spellings: tuple[Spelling, ...]


def _item(graph: fx.Graph, value: fx.Node, index: int = 0) -> fx.Node:
    return graph.call_function(operator.getitem, (value, index))


def _bump(graph: fx.Graph, kwargs: dict[str, object]) -> fx.Node:
    return _item(graph, graph.call_function(hop.auto_functionalized, (ops.bump.default,), kwargs), 1)


def _cond(graph: fx.Graph, value: fx.Node, body: str) -> fx.Node:
    positive = graph.call_function(aten.gt.Scalar, (graph.call_function(aten.sum.default, (value,)), 0))
    return _item(
        graph, graph.call_function(hop.cond, (positive, graph.get_attr(body), graph.get_attr("less"), (value,)))
    )


def _plus_attribute(name: str) -> Spelling:
    return lambda g, v, n: g.call_function(aten.atan2.default, (v, _constant(g, name)))


def _constant(graph: fx.Graph, name: str) -> fx.Node:
    node = graph.get_attr(name)
    CONSTANT.set(node, True)
    return node


OPS = (
    Op(
        1,
        3,
        (
            lambda g, v, n: g.call_function(aten.add.Tensor, (v, n)),
            lambda g, v, n: g.call_function(aten.add.Tensor, (v,), {"other": n}),
            lambda g, v, n: g.call_function(aten.add.Tensor, (v, n), {"alpha": 1}),
            lambda g, v, n: g.call_function(aten.add.Tensor, (), {"other": n, "self": v}),
        ),
    ),
    Op(1, 3, (lambda g, v, n: g.call_function(aten.add.Tensor, (v, float(n))),)),
    Op(
        1,
        2,
        (
            lambda g, v, n: g.call_function(aten.cumsum.default, (v, n)),
            lambda g, v, n: g.call_function(aten.cumsum.default, (v,), {"dtype": None, "dim": n}),
        ),
    ),
    Op(
        1,
        3,
        (
            lambda g, v, n: g.call_function(aten.clamp.default, (v, n)),
            lambda g, v, n: g.call_function(aten.clamp.default, (v, n, None)),
            lambda g, v, n: g.call_function(aten.clamp.default, (v,), {"min": n}),
        ),
    ),
    Op(1, 3, (lambda g, v, n: g.call_method("clamp", (v,), {"max": n}),)),
    Op(1, 3, (lambda g, v, n: g.call_function(torch.mul, (v, n)),)),
    Op(1, 3, (lambda g, v, n: g.call_function(operator.sub, (v, n)),)),
    Op(1, 1, (_plus_attribute("buffer"), _plus_attribute("twin"))),
    Op(1, 1, (_plus_attribute("buffer64"),)),
    Op(1, 1, (_plus_attribute("zero"),)),
    Op(1, 1, (_plus_attribute("minus_zero"),)),
    Op(1, 1, (_plus_attribute("nan"), _plus_attribute("twin_nan"))),
    Op(
        2,
        1,
        (
            lambda g, v, n: _item(g, g.call_function(aten.sort.stable, (v,), {"stable": True})),
            lambda g, v, n: _item(g, g.call_function(aten.sort.stable, (v,), {"descending": False, "stable": True})),
        ),
    ),
    Op(2, 1, (lambda g, v, n: _item(g, g.call_function(aten.chunk.default, (v, 1))),)),
    Op(2, 1, (lambda g, v, n: _item(g, g.call_function(ops.pair.default, (v,)), 1),)),
    Op(
        1,
        1,
        (
            lambda g, v, n: g.call_function(ops.opaque.default, (v,)),
            lambda g, v, n: g.call_function(ops.opaque.default, (v, 1)),
            lambda g, v, n: g.call_function(ops.opaque.default, (v,), {"n": 1}),
        ),
    ),
    Op(2, 3, (lambda g, v, n: _bump(g, {"x": v, "n": n}), lambda g, v, n: _bump(g, {"n": n, "x": v}))),
    Op(4, 1, (lambda g, v, n: _cond(g, v, "twice"), lambda g, v, n: _cond(g, v, "twice_again"))),
)
Recipe = tuple[tuple[int, int], ...]  # (which of OPS, n) of each step


def random_recipes(rng: random.Random) -> list[Recipe]:
    """Two to four different chains, some with a beginning in common."""
    recipes: list[Recipe] = []
    for _ in range(rng.randint(2, 4)):
        begin = rng.choice(recipes)[: rng.randint(0, 2)] if recipes else ()
        steps = [(which, rng.randrange(OPS[which].num_variants)) for which in rng.choices(range(len(OPS)), k=3)]
        recipes.append((*begin, *steps))
    return list(dict.fromkeys(recipes))


def mixed_module(copies: list[Recipe], rng: random.Random) -> fx.GraphModule:
    """x plus the value of each of `copies`, whose steps are written in any order that keeps each chain's own."""
    graph = fx.Graph()
    x, layout = graph.placeholder("x"), graph.placeholder("layout")
    ROLE.set(x, "tokens")
    ROLE.set(layout, "layout")
    values, turns = [layout] * len(copies), [index for index, copy in enumerate(copies) for _ in copy]
    done = [0] * len(copies)
    rng.shuffle(turns)
    for index in turns:
        which, n = copies[index][done[index]]
        values[index] = rng.choice(OPS[which].spellings)(graph, values[index], n)
        done[index] += 1
        if done[index] == len(copies[index]):
            x = graph.call_function(aten.add.Tensor, (x, values[index]))
    graph.output(x)
    return fx.GraphModule(make_root(), graph)


def share(gm: fx.GraphModule) -> tuple[int, int]:
    """How many calls are left in prepare_metadata and outside, its call and its outputs not counted."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 6, generator=generator), torch.randint(-5, 5, (4, 6), generator=generator).double()]
    want: Tensor = gm(*inputs)
    pipeline.run(gm, [ShareMetadata()])
    assert want.numpy().tobytes() == gm(*inputs).numpy().tobytes()
    (prepare,) = prepare_nodes(gm)
    inner = getattr(gm, PREPARE).graph.nodes
    outside = [node for node in gm.graph.nodes if node.op[:5] == "call_" and node is not prepare]
    return sum(node.op[:5] == "call_" for node in inner), len(outside) - len(prepare.users)


@pytest.mark.parametrize("seed", range(100))
def test_only_distinct_values_remain(seed: int) -> None:
    rng = random.Random(seed)
    recipes = random_recipes(rng)
    copies = recipes + rng.choices(recipes, k=20)
    beginnings = {recipe[:length] for recipe in recipes for length in range(1, len(recipe) + 1)}
    inside, outside = share(mixed_module(copies, rng))
    assert inside == sum(OPS[beginning[-1][0]].num_nodes for beginning in beginnings)
    assert outside == len(copies)


def test_deep_chains() -> None:
    """Two equal chains of 2,000 ops beside a chain of activations that reads them all along."""
    chain: Recipe = ((2, 0), (5, 1), (4, 0), (6, 1)) * 500
    inside, outside = share(mixed_module([chain, chain], random.Random(0)))
    assert (inside, outside) == (2000, 2)


def test_wide_fan_out() -> None:
    """2,000 copies of two values, each read once."""
    copies: list[Recipe] = [((2, index % 2),) for index in range(2000)]
    assert share(mixed_module(copies, random.Random(0))) == (2, 2000)
