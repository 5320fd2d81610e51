"""`nest_inputs`: [batch, seq] inputs become one packed stream and its layout."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODEL_TYPES
from traces import apply, before, count, text

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.edit import placeholder, placeholders, take_near_misses
from autodeploy.graph.meta import ROLE
from autodeploy.metadata import fields
from passes import NestInputs

ATTENTION = torch.ops.autodeploy.attention.default


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packs_the_inputs(model_type: str) -> None:
    gm = before("nest_inputs", model_type)
    assert apply(NestInputs(), gm) == 1
    assert [(node.name, ROLE.of(node)) for node in placeholders(gm)] == [
        ("input_ids", "tokens"),
        ("layout", "layout"),
    ]
    assert count(gm, fields.position_ids) == 1
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        assert node.kwargs["cu_seqlens"].target is fields.cu_seqlens_q


def test_sizes_of_the_inputs_become_one_and_the_number_of_tokens() -> None:
    gm = before("nest_inputs")
    NestInputs().apply(gm)
    sizes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert {size.args for size in sizes if size.args[0] in placeholders(gm)} == {(placeholder(gm, "tokens"), 0)}


def test_another_used_input_is_refused() -> None:
    gm = before("nest_inputs")
    user = next(iter(gm.graph.output_node().all_input_nodes))
    with gm.graph.inserting_after(placeholders(gm)[-1]):
        mask = gm.graph.placeholder("attention_mask")
    with gm.graph.inserting_after(user):
        masked = gm.graph.call_function(torch.ops.aten.mul.Tensor, (user, mask))
    gm.graph.output_node().replace_input_with(user, masked)
    graph = text(gm)
    with pytest.raises(UnsupportedFeature, match="'attention_mask' that cannot be packed"):
        NestInputs().apply(gm)
    assert text(gm) == graph


def test_a_graph_without_input_ids_is_a_near_miss() -> None:
    gm = before("nest_inputs")
    gm.graph.find_nodes(op="placeholder")[0].name = "inputs_embeds"
    assert NestInputs().apply(gm) == 0
    assert [reason for _, reason in take_near_misses(gm)] == ["is not called input_ids"] * 2
