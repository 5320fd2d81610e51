"""Causal convolutions that a model writes itself, found by `find` in exported graphs, and those that are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional as F

from autodeploy.attention_forms.find import find
from autodeploy.graph.edit import take_near_misses
from autodeploy.ops.kinds import kind_of
from autodeploy.trace.aten import from_export

CHANNELS, TAPS = 6, 4
Form = Callable[[Tensor, Tensor, Tensor], Tensor]
CAUSAL: dict[str, Form] = {
    "padded on both sides and cut": lambda x, w, b: F.conv1d(x, w, b, padding=TAPS - 1, groups=CHANNELS)[
        ..., : x.shape[2]
    ],
    "padded in front": lambda x, w, b: F.conv1d(F.pad(x, (TAPS - 1, 0)), w, b, groups=CHANNELS),
    "padded by a value of zero": lambda x, w, b: F.conv1d(F.pad(x, (TAPS - 1, 0), value=0.0), w, groups=CHANNELS),
    "with gaps, cut to all of it": lambda x, w, b: F.conv1d(
        F.pad(x, (6, 0))[..., -(6 + x.shape[2]) :], w[..., :3], b, dilation=3, groups=CHANNELS
    ),
    "the token before": lambda x, w, b: F.pad(x.transpose(1, 2), (0, 0, 1, -1)).transpose(1, 2),
}
OTHERS: dict[str, Form] = {
    "cut at the other end": lambda x, w, b: F.conv1d(x, w, b, padding=TAPS - 1, groups=CHANNELS)[..., TAPS - 1 :],
    "padded behind": lambda x, w, b: F.conv1d(F.pad(x, (0, TAPS - 1)), w, b, groups=CHANNELS),
    "padded by ones": lambda x, w, b: F.conv1d(F.pad(x, (TAPS - 1, 0), value=1.0), w, b, groups=CHANNELS),
    "padded by itself": lambda x, w, b: F.conv1d(F.pad(x, (TAPS - 1, 0), mode="circular"), w, b, groups=CHANNELS),
    "with gaps, too short": lambda x, w, b: F.conv1d(F.pad(x, (5, 1)), w[..., :3], b, dilation=3, groups=CHANNELS),
    "read twice": lambda x, w, b: (
        (y := F.conv1d(x, w, b, padding=TAPS - 1, groups=CHANNELS))[..., : x.shape[2]] + y[..., TAPS - 1 :]
    ),
    "over channels": lambda x, w, b: F.conv1d(F.pad(x, (TAPS - 1, 0)), w.expand(CHANNELS, CHANNELS, TAPS), b),
}


class Model(nn.Module):
    """The convolution of embeddings, with an attention beside it, so that there is one canonical node at least."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.embedding = nn.Embedding(16, CHANNELS)
        self.weight = nn.Parameter(torch.randn(CHANNELS, 1, TAPS))
        self.bias = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        head = hidden[:, None]
        seen = F.scaled_dot_product_attention(head, head, head, is_causal=True)[:, 0]
        return seen + self.form(hidden.transpose(1, 2), self.weight, self.bias).transpose(1, 2)


def found(form: Form) -> tuple[Model, fx.GraphModule, list[str]]:
    model = Model(form).eval()
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    inputs = {"input_ids": torch.zeros(2, 12, dtype=torch.int64)}
    gm = from_export(torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False))
    names = [kind.name for node in find(gm) if (kind := kind_of(node.target))]
    gm.recompile()
    return model, gm, sorted(names)


@pytest.mark.parametrize("form", CAUSAL)
def test_causal_convolution_is_canonical(form: str) -> None:
    model, gm, names = found(CAUSAL[form])
    assert names == ["attention", "causal_conv1d"]
    assert not take_near_misses(gm)
    input_ids = torch.arange(15).view(3, 5)
    torch.testing.assert_close(gm(input_ids), model(input_ids))


@pytest.mark.parametrize("form", OTHERS)
def test_another_convolution_is_a_near_miss(form: str) -> None:
    _, gm, names = found(OTHERS[form])
    assert names == ["attention"]
    assert ["came through no door of causal_conv1d" in reason for _, reason in take_near_misses(gm)] == [True]
