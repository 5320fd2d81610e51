"""`gather_logits`: only the rows that somebody samples go through the head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import MODEL_TYPES, tiny
from traces import apply, before, count, text

import autodeploy as ad
from autodeploy.graph.edit import take_near_misses
from autodeploy.graph.values import record_values
from autodeploy.metadata import fields
from autodeploy.ops.cache import PoolSizes
from passes import GatherLogits

aten = torch.ops.aten


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gathers_before_the_head(model_type: str) -> None:
    gm = before("gather_logits", model_type)
    assert apply(GatherLogits(), gm) == 1
    (rows,) = gm.graph.find_nodes(op="call_function", target=aten.index_select.default)
    assert count(gm, fields.logits_indices) == 1
    heads = [node for node in rows.users if node.target is aten.linear.default]
    assert len(heads) == len(rows.users) == 1
    assert str(heads[0].args[1]) in ("lm_head_weight", "transformer_wte_weight", "model_embed_tokens_weight")


def test_softcapped_logits_are_gathered_before_the_cap() -> None:
    gm = before("gather_logits", "gemma2")
    apply(GatherLogits(), gm)
    (rows,) = gm.graph.find_nodes(op="call_function", target=aten.index_select.default)
    assert [node.target for node in rows.users] == [aten.linear.default]


def test_hidden_states_that_others_read_are_left_whole() -> None:
    gm = before("gather_logits")
    head = next(iter(gm.graph.output_node().all_input_nodes))
    hidden = head.all_input_nodes[0]
    with gm.graph.inserting_after(head):
        other = gm.graph.call_function(aten.sum.default, (hidden,))
        total = gm.graph.call_function(aten.add.Tensor, (head, other))
    other.append(total)
    record_values([other, total])
    gm.graph.output_node().replace_input_with(head, total)
    apply(GatherLogits(), gm)
    (rows,) = gm.graph.find_nodes(op="call_function", target=aten.index_select.default)
    assert rows.args[0] is total


def test_padded_inputs_are_a_near_miss() -> None:
    gm = before("nest_inputs")
    graph = text(gm)
    assert GatherLogits().apply(gm) == 0
    assert [reason for _, reason in take_near_misses(gm)] == ["the graph has no packed inputs; nest_inputs comes first"]
    assert text(gm) == graph


@torch.no_grad()
def test_each_sequence_has_as_many_logits_as_it_wants() -> None:
    model = tiny("llama")
    result = ad.apply(ad.trace(model), page_size=4)
    assert result.layout_spec is not None
    prompts, wanted = [[5, 6, 7, 8, 9], [4, 3, 2], [11, 12]], [4, 0, 1]
    nested = ad.nest_sequences(
        [token for prompt in prompts for token in prompt],
        [len(prompt) for prompt in prompts],
        [0] * 3,
        np.arange(1, 7).reshape(1, 3, 2),
        [0] * 3,
        result.layout_spec,
        num_pages=[7],
        num_state_slots=1,
        num_logits=wanted,
    )
    assert len(nested.layout) == sum(wanted), "two rows of padding"
    caches = [torch.zeros(each.whole(PoolSizes((7,), 4, 1))) for each in result.cache_specs]
    logits = result.module(nested.input_ids, nested.layout, *caches)
    whole = [model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]
    expected = [rows[len(rows) - count :] for rows, count in zip(whole, wanted, strict=True)]
    torch.testing.assert_close(logits, torch.cat(expected))
