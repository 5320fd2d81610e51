"""The bound on peak memory: what is too large to be kept from the start stays where it is, and is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from autodeploy.compiler import pipeline
from autodeploy.graph.dependence import split
from autodeploy.graph.edit import PREPARE, prepare_nodes
from autodeploy.graph.memory import PEAK_BYTES, too_large_to_hoist
from autodeploy.graph.meta import KEPT, VALUE
from passes import ShareMetadata

aten = torch.ops.aten
SEQ = 1024  # a mask [SEQ, SEQ] of 8-byte distances is 8 MiB


class Masks(torch.nn.Module):
    """One large mask per layer, of windows that differ or not, each dead when the next is made."""

    def __init__(self, windows: list[int]) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for window in self.windows:
            distance = positions[:, None] - positions[None, :]
            mask = distance * (distance < window)
            x = torch.mv(mask.to(x.dtype), x).tanh()
        return x


def graph_of(windows: list[int]) -> fx.GraphModule:
    inputs = (torch.zeros(SEQ), torch.arange(SEQ))
    gm = torch.export.export(Masks(windows), inputs).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def share(gm: fx.GraphModule) -> pipeline.PassRecord:
    x, positions = torch.randn(SEQ), torch.arange(SEQ)
    want = gm(x, positions)
    record = pipeline.run(gm, [ShareMetadata()])[0]
    assert torch.equal(gm(x, positions), want)
    done = str(gm.graph)
    assert ShareMetadata().apply(gm) == 0
    assert str(gm.graph) == done
    return record


def test_many_large_masks_stay_and_what_they_are_made_of_is_shared() -> None:
    gm = graph_of([8 * layer for layer in range(1, 9)])
    record = share(gm)
    assert any("peak memory" in miss.reason for miss in record.near_misses)
    kept = [node for node in gm.graph.nodes if KEPT.on(node)]
    assert len(kept) >= 8
    assert len(prepare_nodes(gm)) == 1
    inner = getattr(gm, PREPARE).graph
    assert inner.find_nodes(op="call_function", target=aten.unsqueeze.default)
    assert not inner.find_nodes(op="call_function", target=aten._to_copy.default)


def test_a_mask_that_all_layers_share_is_kept_from_the_start() -> None:
    record = share(gm := graph_of([8] * 8))
    assert record.near_misses == ()
    assert split(gm).metadata == []


def test_small_values_are_not_even_weighed() -> None:
    gm = graph_of([8, 16])
    parts = split(gm)
    small = [node for node in parts.metadata if VALUE.of(node).numel() * 8 <= PEAK_BYTES]
    assert too_large_to_hoist(gm.graph, small) == []


@pytest.mark.parametrize("num_layers", [2, 16])
def test_without_shapes_everything_is_shared(num_layers: int) -> None:
    gm = graph_of([8 * layer for layer in range(1, num_layers + 1)])
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            VALUE.take(node)
    assert share(gm).near_misses == ()


class Dequantised(torch.nn.Module):
    """Weights scaled by a size, which is layout."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(8):
            self.register_buffer(f"weight{index}", torch.ones(512, 512, dtype=torch.int8))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for index in range(8):
            x = x @ (getattr(self, f"weight{index}").float() * positions.shape[0])
        return x


def test_constants_weigh_what_they_are_where_no_shapes_are_recorded() -> None:
    class Tracer(fx.Tracer):
        proxy_buffer_attributes = True

    model = Dequantised()
    gm = fx.GraphModule(model, Tracer().trace(model))
    ShareMetadata().apply(gm)
    assert sum(KEPT.on(node) for node in gm.graph.nodes) >= 7
