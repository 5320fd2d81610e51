"""Graphs that Dynamo and torch.export captured, in the spelling that the passes read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_graphs import ATTENTION
from tiny_models import tiny, tokens
from torch import Tensor, fx

from autodeploy.errors import TraceError
from autodeploy.graph.location import module_path
from autodeploy.graph.meta import ROLE, STACK_TRACE
from autodeploy.trace.aten import from_dynamo, from_export
from passes import Canonicalize, FindAttention


def test_a_dynamo_graph_of_a_model_has_its_attention_found() -> None:
    model, graphs = tiny("gemma3_text"), []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        aten = from_dynamo(gm)
        Canonicalize().apply(aten)
        FindAttention().apply(aten)
        aten.graph.eliminate_dead_code()
        aten.recompile()
        graphs.append(aten)
        return aten.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch, length in ((2, 12), (3, 19)):
        inputs = tokens(batch, length)
        for value in inputs.values():
            torch._dynamo.mark_dynamic(value, 0)
            torch._dynamo.mark_dynamic(value, 1)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
    (gm,) = graphs
    nodes = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    assert [node.kwargs["span"] for node in nodes] == ["window_8"] * 3 + ["full"]
    assert module_path(nodes[0]).endswith("layers.0.self_attn")
    assert "modeling_gemma3.py" in STACK_TRACE.of(nodes[0])
    torch._dynamo.reset()


def test_inputs_keep_their_order_names_and_meta() -> None:
    seen: list[tuple[fx.GraphModule, fx.GraphModule]] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        for node in gm.graph.find_nodes(op="placeholder"):
            ROLE.set(node, "layout")
        seen.append((gm, from_dynamo(gm)))
        return seen[-1][1].forward

    def function(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first.float().softmax(-1), torch.nn.functional.relu(second)

    x, y = torch.randn(2, 3), torch.randn(4)
    for out, expected in zip(torch.compile(function, backend=backend)(x, y), function(x, y), strict=True):
        torch.testing.assert_close(out, expected)
    old, new = (gm.graph.find_nodes(op="placeholder") for gm in seen[0])
    assert [node.target for node in new] == [node.target for node in old]
    assert {ROLE.of(node) for node in new} == {"layout"}
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in seen[0][1].graph.nodes if n.op == "call_function")
    torch._dynamo.reset()


def test_a_graph_without_fake_values_is_refused() -> None:
    with pytest.raises(TraceError, match="no fake values"):
        from_dynamo(fx.symbolic_trace(lambda x: x + 1))


def test_an_export_that_returns_several_tensors_needs_a_pick() -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"first": x + 1, "second": x * 2}

    program = torch.export.export(Pair(), (torch.ones(2),))
    gm = from_export(program, lambda returned: returned["second"])
    assert torch.equal(gm(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(TraceError, match="not a tensor"):
        from_export(program, lambda returned: returned)
