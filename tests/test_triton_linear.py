"""The kernel of few rows, on a GPU or in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import triton_device as triton_device
from torch import Tensor

from autodeploy.kernels.triton_linear import Config, choose_config, launch
from autodeploy.ops.linear import OP, SIBLINGS_OP, TOLERANCES

TINY = Config(block_n=16, block_k=32, num_warps=4, num_stages=2)


def _operands(rows: int, sizes: list[int], input_size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """input, bias of the first layer, weights."""
    generator = torch.Generator().manual_seed(rows + 100 * input_size)
    shapes = [(rows, input_size), (sizes[0],), *((size, input_size) for size in sizes)]
    scales = [1.0, 1.0, *(input_size**-0.5 for _ in sizes)]
    values = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return [value.to(dtype).to(device) for value in values]


def _assert_right(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    expected = input.double() @ weight.double().T + (0 if bias is None else bias.double())
    atol, rtol = TOLERANCES[out.dtype]
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 33, 64])
def test_one_layer_with_bias(rows: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    input, bias, weight = _operands(rows, [40], 96, dtype, triton_device)
    (out,) = launch(input, [weight], bias, TINY)
    _assert_right(out, input, weight, bias)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 20), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4), input_size=st.integers(1, 70)
)
def test_any_shapes(rows: int, sizes: list[int], input_size: int, triton_device: torch.device) -> None:
    input, _, *weights = _operands(rows, sizes, input_size, torch.bfloat16, triton_device)
    outputs = launch(input, weights, config=TINY)
    again = launch(input, weights, config=TINY)
    for out, same, weight in zip(outputs, again, weights, strict=True):
        _assert_right(out, input, weight)
        assert torch.equal(out, same)


def test_neighbours_are_not_touched(triton_device: torch.device) -> None:
    """NaN in the memory behind the input and in front of the weights is not read."""
    input, _, weight = _operands(3, [20], 24, torch.bfloat16, triton_device)
    nan = torch.full((64, 24), torch.nan, dtype=input.dtype, device=input.device)
    inputs, weights = torch.cat([input, nan]), torch.cat([nan, weight, nan])
    (out,) = launch(inputs[:3], [weights[64:84]], config=TINY)
    _assert_right(out, input, weight)


@pytest.mark.parametrize("rows", [0, 2, 65])
def test_ops(rows: int, triton_device: torch.device) -> None:
    """Both ops give the same for any number of rows, whichever product they choose."""
    input, bias, *weights = _operands(rows, [24, 8], 32, torch.bfloat16, triton_device)
    input = input[None]
    for out, weight in zip(SIBLINGS_OP(input, weights), weights, strict=True):
        assert out.shape == (1, rows, weight.shape[0])
        _assert_right(out, input, weight)
    _assert_right(OP(input, weights[0], bias), input, weights[0], bias)


def test_ops_trace() -> None:
    input, bias, *weights = _operands(3, [24, 8], 32, torch.bfloat16, torch.device("cpu"))
    torch.library.opcheck(SIBLINGS_OP, (input, weights))
    torch.library.opcheck(OP, (input, weights[0], bias))


def test_configs_fill_the_chip() -> None:
    """Llama-3-8B's layers give most of an H100's 132 processors work, and a short input is not padded to a long one."""
    for num_features, input_size in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]:
        for rows in (1, 8, 16):
            assert num_features // choose_config(rows, num_features, input_size, 227 << 10).block_n >= 64
    assert choose_config(1, 64, 48, 227 << 10).block_k == 64
    assert [choose_config(64, 28672, 4096, kib << 10).num_stages for kib in (227, 163, 64)] == [4, 3, 1]
