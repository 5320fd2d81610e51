"""`autodeploy.graph`: what passes note on a graph."""

from __future__ import annotations

from torch import fx, nn

from autodeploy.attention_forms.evaluate import Evaluator
from autodeploy.graph.edit import copy_module, look_at
from autodeploy.graph.meta import LOOKED_AT


def test_what_was_looked_at_in_a_copy_is_noted_there_alone() -> None:
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    look_at(gm, "weight")
    copy = copy_module(gm)
    look_at(copy, "bias")
    assert (LOOKED_AT.of(gm), LOOKED_AT.of(copy)) == ({"weight"}, {"weight", "bias"})


def test_whatever_is_evaluated_is_noted() -> None:
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    evaluate = Evaluator(gm, {})
    for node in gm.graph.find_nodes(op="get_attr"):
        evaluate(node)
    assert LOOKED_AT.of(gm) == {"weight", "bias"}
