"""`lower_fields`: inside prepare_metadata fields become one launch, or are written out as their formulas."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted
from tiny_models import MODEL_TYPES
from torch import fx
from traces import apply, before, count, traced

from autodeploy.compiler import pipeline
from autodeploy.graph.edit import PREPARE
from autodeploy.kernels.registry import field_named
from autodeploy.metadata import fields
from autodeploy.metadata.field import is_field
from passes import LowerFields, default


def waiting(gm: fx.GraphModule) -> int:
    return sum(is_field(node.target) for node in getattr(gm, PREPARE).graph.nodes)


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


def launches(gm: fx.GraphModule) -> int:
    return count(getattr(gm, PREPARE), torch.ops.autodeploy.launch_fields.default)


@pytest.mark.parametrize("model_type", ["gemma2", "lfm2"])
def test_one_launch_where_the_device_has_it(model_type: str) -> None:
    with interpreted():
        gm = before("lower_fields", model_type)
        num_fields = waiting(gm)
        assert apply(LowerFields(), gm) >= num_fields > 0
    assert waiting(gm) == 0
    assert launches(gm) == 1
    assert not [node for node in getattr(gm, PREPARE).graph.nodes if "cumsum" in str(node.target)]


def test_what_a_launch_does_not_know_is_written_out_beside_it() -> None:
    with interpreted():
        gm, steps = traced("lfm2"), default({"conv": "torch_conv1d"})
        pipeline.run(gm, steps[: [step.name for step in steps].index("lower_fields")])
        assert getattr(gm, PREPARE).graph.find_nodes(op="call_function", target=field_named("conv_window_indices").op)
        apply(LowerFields(), gm)
    assert waiting(gm) == 0
    assert launches(gm) == 1
    assert (
        count(getattr(gm, PREPARE), torch.nn.functional.pad) == 0
    )  # the formula's own cu_seqlens_q comes from the launch
