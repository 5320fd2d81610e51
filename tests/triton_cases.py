"""Every Triton kernel as it is launched at typical sizes, to be compiled for GPUs that need not be there."""

from __future__ import annotations

from typing import Any, NamedTuple

from autodeploy.kernels import triton_conv1d, triton_linear


class Case(NamedTuple):
    """The arguments of `compile_kernel`; `options` are num_warps and num_stages."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


CASES: list[Case] = []

# LFM2: 2,048 channels, 3 taps, channels side by side, as a projection leaves them. Mamba: 4 taps, bias and SiLU.
_CONV_ROWS = {"states": "*bf16", "slot_S": "*i32", "goes_on_S": "*i1", "start_S1": "*i32"}
_CONV_SIZES = {"channels": "i32:16", "stride_t": "i32:16", "stride_slot": "i32"}
_CONV = {"hidden_CT": "*bf16", "weight_CN": "*bf16", "out_TC": "*bf16"} | _CONV_ROWS | _CONV_SIZES
_LFM2 = {"stride_c": 1, "NUM_TAPS": 3, "BLOCK_N": 4, "BLOCK_C": 128}
_MAMBA = {"stride_c": 1, "NUM_TAPS": 4, "BLOCK_N": 4, "BLOCK_C": 128}
_TILED = {"row_T": "*i32", "num_tokens": "i32"}
_BIAS = {"bias_C": "*bf16"}
CASES += [
    Case("conv1d_decode_lfm2", triton_conv1d.decode_kernel, _CONV, _LFM2 | {"SILU": False}, {"num_warps": 1}),
    Case("conv1d_decode_mamba", triton_conv1d.decode_kernel, _CONV | _BIAS, _MAMBA | {"SILU": True}, {"num_warps": 1}),
    Case(
        "conv1d_output_mamba",
        triton_conv1d.output_kernel,
        _CONV | _BIAS | _TILED,
        _MAMBA | {"SILU": True, "BLOCK_T": 8},
        {"num_warps": 4},
    ),
    Case(
        "conv1d_state_mamba",
        triton_conv1d.state_kernel,
        {"hidden_CT": "*bf16"} | _CONV_ROWS | _CONV_SIZES,
        _MAMBA,
        {"num_warps": 1},
    ),
]

# Llama-3-8B: q, k and v for 8 rows, down for 16.
_LINEAR = {"x_ptr": "*bf16", "w0_ptr": "*bf16", "out0_ptr": "*bf16", "N0": "i32:16", "M": "i32"}
_SIBLINGS = {f"{name}{i}{end}": kind for i in (1, 2) for name, end, kind in (
    ("w", "_ptr", "*bf16"), ("out", "_ptr", "*bf16"), ("N", "", "i32:16"))}  # fmt: skip
for _name, _signature, _rows, _features, _input_size in (
    ("linears_qkv", _LINEAR | _SIBLINGS, 8, 6144, 4096),
    ("linears_down", _LINEAR, 16, 4096, 14336),
):
    _cut = triton_linear.choose_config(_rows, _features, _input_size)
    _blocks = {"K": _input_size, "BLOCK_M": _rows, "BLOCK_N": _cut.block_n, "BLOCK_K": _cut.block_k, "EARLY": False}
    _options = {"num_warps": _cut.num_warps, "num_stages": _cut.num_stages}
    CASES.append(Case(_name, triton_linear.linears_kernel, _signature, _blocks, _options))
