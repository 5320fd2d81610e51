"""`lower_fields`: inside prepare_metadata each field is written out as its formula."""

from __future__ import annotations

import pytest
from tiny_models import MODEL_TYPES
from torch import fx
from traces import apply, before

from autodeploy.graph import PREPARE
from autodeploy.metadata import fields
from passes import LowerFields


def waiting(gm: fx.GraphModule) -> int:
    return sum(fields.is_field(node.target) for node in getattr(gm, PREPARE).graph.nodes)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_field_is_left(model_type: str) -> None:
    gm = before("lower_fields", model_type)
    num_fields, graph = waiting(gm), str(gm.graph)
    assert apply(LowerFields(), gm) >= num_fields > 0
    assert waiting(gm) == 0
    assert str(gm.graph) == graph


def test_common_parts_of_formulas_are_computed_once() -> None:
    gm = before("lower_fields", "gemma2")
    LowerFields().apply(gm)
    cumsums = [node for node in getattr(gm, PREPARE).graph.nodes if "cumsum" in str(node.target)]
    assert len({node.args for node in cumsums}) == len(cumsums)


def test_a_graph_without_prepare_metadata_is_left_alone() -> None:
    gm = before("share_metadata")
    graph = str(gm.graph)
    assert LowerFields().apply(gm) == 0
    assert str(gm.graph) == graph
    assert gm.graph.find_nodes(op="call_function", target=fields.position_ids)
