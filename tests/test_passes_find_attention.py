"""`find_attention` as a pass: traced canonical nodes are counted, raw ones become canonical, the rest is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny, tokens
from torch import Tensor, fx
from torch.fx.graph import CodeGen
from torch.nn import functional as F
from traces import apply, before, count, text

import autodeploy as ad
from autodeploy.errors import NoAttentionFound, UnsupportedFeature
from autodeploy.graph.edit import take_near_misses
from autodeploy.graph.meta import VALUE
from autodeploy.trace.aten import from_export
from passes import Canonicalize, FindAttention, NestInputs

ATTENTION = torch.ops.autodeploy.attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Model(torch.nn.Module):
    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 8)
        self.arguments = arguments

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids).unflatten(-1, (2, 4)).transpose(1, 2)
        hidden = F.scaled_dot_product_attention(hidden, hidden, hidden, **self.arguments)  # type: ignore[arg-type]
        return hidden.transpose(1, 2).flatten(2)


def traced(**arguments: object) -> fx.GraphModule:
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    inputs = (torch.zeros(3, 12, dtype=torch.int64),)
    with torch.no_grad():
        program = torch.export.export(Model(**arguments), inputs, dynamic_shapes=dims, strict=False)
    exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    gm = fx.GraphModule(exported, exported.graph)
    gm.graph.set_codegen(CodeGen())
    output = gm.graph.output_node()
    output.args = (output.all_input_nodes[0],)
    Canonicalize().apply(gm)
    return gm


@pytest.mark.parametrize(("model_type", "nodes"), [("llama", 4), ("gpt_oss", 4), ("lfm2", 4)])
def test_counts_canonical_nodes(model_type: str, nodes: int) -> None:
    gm = before("find_attention", model_type)
    graph = text(gm)
    assert apply(FindAttention(), gm) == nodes
    assert text(gm) == graph


@pytest.mark.parametrize("scale", [None, 0.3])
def test_rewrites_causal_sdpa(scale: float | None) -> None:
    gm = traced(is_causal=True, scale=scale)
    assert apply(FindAttention(), gm) == 1
    assert (count(gm, ATTENTION), count(gm, SDPA)) == (1, 0)
    (node,) = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    assert node.kwargs["scale"] == pytest.approx(scale or 0.5)
    assert tuple(VALUE.of(node).shape[2:]) == (2, 4)
    apply(NestInputs(), gm)


def test_refuses_dropout() -> None:
    gm = traced(is_causal=True, dropout_p=0.5)
    graph = text(gm)
    with pytest.raises(NoAttentionFound, match="has dropout") as caught:
        FindAttention().apply(gm)
    assert "test_passes_find_attention.py" in str(caught.value)
    assert text(gm) == graph


def test_attention_that_is_not_known_is_a_near_miss_and_refused_when_packed() -> None:
    gm = before("find_attention")
    node = next(iter(gm.graph.find_nodes(op="call_function", target=ATTENTION)))
    query, key, value = node.args[:3]
    with gm.graph.inserting_after(node):
        other = gm.graph.call_function(SDPA, (query, key, value), {"dropout_p": 0.5})
    other.meta = {**node.meta, "val": VALUE.of(query)}
    user = next(iter(node.users))
    with gm.graph.inserting_before(user):
        back = gm.graph.call_function(torch.ops.aten.transpose.int, (other, 1, 2))
    back.meta = dict(node.meta)
    user.replace_input_with(node, back)
    FindAttention().apply(gm)
    assert take_near_misses(gm) == [(other, "has dropout; call model.eval() before tracing")]
    with pytest.raises(UnsupportedFeature, match="mixes tokens: it has dropout") as caught:
        NestInputs().apply(gm)
    assert "model.layers.0.self_attn" in caught.value.where


def test_softmax_and_matmul_without_heads_are_a_near_miss() -> None:
    class Eager(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(-1) @ x

    gm = torch.export.export(Eager(), (torch.randn(2, 3, 4),)).module(check_guards=False)
    with pytest.raises(NoAttentionFound, match="has heads that cannot be told from its batch"):
        FindAttention().apply(gm)  # type: ignore[arg-type]
    assert not take_near_misses(gm)  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "mistral"])
def test_a_model_exported_as_it_is_gets_paged(model_type: str, implementation: str) -> None:
    model = tiny(model_type)
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    inputs = {name: value.clone() for name, value in tokens(2, 12).items()}
    dims = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    try:
        with torch.no_grad():
            program = torch.export.export(
                model, (), {**inputs, "use_cache": False}, strict=False, dynamic_shapes={**dims, "use_cache": None}
            )
    finally:
        model.set_attn_implementation(before)
    result = ad.apply(from_export(program), verify=True)
    assert len(result.cache_specs) == 2 * 4
