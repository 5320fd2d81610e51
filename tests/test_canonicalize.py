"""`canonicalize`: what it drops and what it must not, on whole models and on graphs of a few nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_trace import canonical_nodes
from tiny_models import MODEL_TYPES, tiny, tokens
from torch import Tensor, fx

from autodeploy.graph.edit import take_near_misses
from autodeploy.graph.meta import VALUE
from autodeploy.trace import trace
from passes.canonicalize import Canonicalize

aten = torch.ops.aten
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def export(function: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return function(*inputs)

    program = torch.export.export(Module(), args, strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def canonicalize(gm: fx.GraphModule) -> int:
    removed = Canonicalize().apply(gm)
    gm.graph.lint()
    gm.recompile()
    return removed


def targets(gm: fx.GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op in ("call_function", "call_module")]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_models_lose_nodes_and_no_bit(model_type: str) -> None:
    gm = trace(tiny(model_type))
    before, num_before, num_canonical = gm(**tokens(3, 17)), len(gm.graph.nodes), len(canonical_nodes(gm))
    removed = canonicalize(gm)
    assert removed == num_before - len(gm.graph.nodes) > 0
    assert not {aten._assert_tensor_metadata.default, aten.alias.default, aten.dropout.default} & set(targets(gm))
    assert len(canonical_nodes(gm)) == num_canonical
    assert torch.equal(gm(**tokens(3, 17)), before)
    assert canonicalize(gm) == 0


def _region(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    with torch.autocast("cpu", enabled=False):
        return y + 1


def _nested_regions(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
        with torch.autocast("cpu", enabled=False):
            return y + 1


# A function of x [2, 3, 4] float32 (contiguous), and the targets that are left of it.
DROPPED: dict[str, tuple[Callable[[Tensor], Tensor], list[object]]] = {
    "cast to the same dtype": (lambda x: (x * 2).to(torch.float32), [aten.mul.Tensor]),
    "type_as": (lambda x: (x * 2).type_as(x), [aten.mul.Tensor]),
    "dropout outside training": (lambda x: torch.dropout(x * 2, 0.5, False), [aten.mul.Tensor]),
    "dropout of nothing": (lambda x: torch.dropout(x * 2, 0.0, True), [aten.mul.Tensor]),
    "view and reshape": (lambda x: (x * 2).view(2, 3, 4).reshape(2, 3, 4), [aten.mul.Tensor]),
    "expand": (lambda x: (x * 2).expand(2, 3, 4), [aten.mul.Tensor]),
    "whole slice": (lambda x: (x * 2)[:, 0:], [aten.mul.Tensor]),
    "transpose twice": (lambda x: (x * 2).transpose(0, 1).transpose(1, 0) * 3, [aten.mul.Tensor] * 2),
    "permute and back": (lambda x: (x * 2).permute(1, 2, 0).permute(2, 0, 1) * 3, [aten.mul.Tensor] * 2),
    "clone": (lambda x: (x * 2).clone() * 3, [aten.mul.Tensor] * 2),
    "regions": (_region, [aten.mul.Tensor, aten.add.Tensor]),
    "nested regions": (_nested_regions, [aten.mul.Tensor, aten.add.Tensor]),
}


@pytest.mark.parametrize("case", DROPPED)
def test_drops(case: str) -> None:
    function, left = DROPPED[case]
    x = torch.randn(2, 3, 4)
    gm = export(function, x)
    assert canonicalize(gm) > 0
    assert targets(gm) == left
    assert torch.equal(gm(x), function(x))
    assert canonicalize(gm) == 0


def test_drops_contiguous_of_what_is_contiguous() -> None:
    gm = export(lambda x: x * 2, torch.randn(2, 3, 4))
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    with gm.graph.inserting_after(product):
        copy = gm.graph.call_function(aten.contiguous.default, (product,))
    VALUE.set(copy, VALUE.of(product).contiguous())
    gm.graph.output_node().replace_input_with(product, copy)
    assert canonicalize(gm) == 1


def _write_to_copy(x: Tensor) -> Tensor:
    y = x * 2
    z = y.clone()
    z.add_(1)
    return y + z


def _write_to_original(x: Tensor) -> Tensor:
    y = x * 2
    z = y.clone()
    y.view(-1).add_(1)
    return y + z


def _write_to_same(x: Tensor) -> Tensor:
    y = x * 2
    z = y.to(torch.float32).contiguous()
    z.add_(1)
    return y + z


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.transpose(1, 2)


# A function, a target that must stay, and the near miss that says why, where there is something to say.
KEPT: dict[str, tuple[Callable[[Tensor], Tensor], object, str]] = {
    "cast": (lambda x: x.to(torch.bfloat16), aten.to.dtype, ""),
    "contiguous of a transpose": (lambda x: x.transpose(0, 1).contiguous(), aten.contiguous.default, ""),
    "view": (lambda x: x.view(6, 4), aten.view.default, ""),
    "slice": (lambda x: x[:, 1:], aten.slice.Tensor, ""),
    "two transposes": (lambda x: x.transpose(0, 1).transpose(1, 2) * 2, aten.transpose.int, ""),
    "cast that copies": (lambda x: x.to(torch.float32, copy=True) * 2, aten.to.dtype, "asks for a copy"),
    "dropout": (lambda x: torch.dropout(x, 1.0, True), aten.dropout.default, "call model.eval"),
    "copy written to": (_write_to_copy, aten.clone.default, "is a copy of which one side is written to"),
    "original written to": (_write_to_original, aten.clone.default, "is a copy of which one side is written to"),
    "returned copy": (lambda x: x.clone(), aten.clone.default, "is returned to a caller"),
    "returned view of a copy": (lambda x: x.clone().mT, aten.clone.default, "is returned to a caller"),
    "autocast": (_autocast, _AUTOCAST, "autocast changes dtypes"),
}


@pytest.mark.parametrize("case", KEPT)
def test_keeps(case: str) -> None:
    function, kept, reason = KEPT[case]
    x = torch.randn(2, 3, 4)
    gm = export(function, x)
    want = function(x)
    canonicalize(gm)
    misses = take_near_misses(gm)
    assert kept in targets(gm)
    assert torch.equal(gm(x), want)
    assert [reason in said for _, said in misses] == ([True] if reason else [])


def test_dropping_what_returns_its_input_keeps_shared_storage() -> None:
    x = torch.randn(2, 3, 4)
    gm = export(_write_to_same, x)
    canonicalize(gm)
    assert targets(gm) == [aten.mul.Tensor, aten.add_.Tensor, aten.add.Tensor]
    assert torch.equal(gm(x), _write_to_same(x))
