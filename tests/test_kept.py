"""What prepare_metadata computes is in Inductor's code once, however many layers read it."""

from __future__ import annotations

import operator

import pytest
import torch
from tiny_models import tiny
from torch import fx
from torch._inductor.utils import run_and_get_code
from traces import traced

import autodeploy as ad
from autodeploy.graph.edit import PREPARE
from autodeploy.inductor.keep import KEEP, keep_metadata
from autodeploy.inductor.lower import lower


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, on import
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_rotary_tables_are_computed_once(model_type: str) -> None:
    result = ad.apply(traced(model_type))
    assert result.layout_spec is not None
    arguments = (result.module, tiny(model_type), result.layout_spec, result.cache_specs, result.report)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lower, *arguments)
    tables = sum("cos" in str(node.target) for node in result.module.get_submodule(PREPARE).graph.nodes)
    assert 1 <= tables <= 2
    assert "".join(codes).count("cos(") == tables


def test_only_what_is_computed_is_kept() -> None:
    """Not a view of an input nor the parts of a list; and a view's memory rather than the view."""
    graph = fx.Graph()
    layout = graph.placeholder("layout")
    made = graph.call_function(torch.cos, (layout,))
    best = graph.call_function(torch.topk, (layout, 1))
    rows = [graph.call_function(torch.ops.aten.select.int, (node, 0, 0)) for node in (layout, made)]
    graph.output((*rows, graph.call_function(operator.getitem, (best, 0))))
    root, outer = torch.nn.Module(), fx.Graph()
    root.add_module(PREPARE, fx.GraphModule(torch.nn.Module(), graph))
    outer.output(outer.call_module(PREPARE, (outer.placeholder("layout"),)))
    gm = fx.GraphModule(root, outer)
    keep_metadata(gm)
    kept = gm.get_submodule(PREPARE).graph.find_nodes(op="call_function", target=KEEP)
    assert [node.args[0] for node in kept] == [made]


def test_as_an_op() -> None:
    torch.library.opcheck(KEEP, (torch.randn(3, 4).t(),))
