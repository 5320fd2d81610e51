"""Every Triton kernel as it is launched at typical sizes, to be compiled for GPUs that need not be there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton_compile import SHARED_BYTES, TARGETS

from autodeploy.kernels import triton_append, triton_conv1d, triton_decode, triton_fields, triton_linear, triton_prefill
from autodeploy.kernels.field_arena import choose_blocks, make_plan
from autodeploy.metadata.field import FieldRequest


class Case(NamedTuple):
    """The arguments of `compile_kernel`; `options` are num_warps and num_stages, `targets` those it runs on."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    targets: tuple[str, ...] = tuple(TARGETS)


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

# Llama-3-8B: q, k and v for 8 rows, gate and up, and down for 16. A launch on AMD's GPUs has fewer stages.
_LINEAR = {"x_ptr": "*bf16", "w0_ptr": "*bf16", "out0_ptr": "*bf16", "N0": "i32:16", "M": "i32"}
_SIBLINGS = {"w1_ptr": "*bf16", "out1_ptr": "*bf16", "N1": "i32:16", "w2_ptr": "*bf16", "out2_ptr": "*bf16"}
_QKV = _LINEAR | _SIBLINGS | {"N2": "i32:16"}


_SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}


def _linear_case(name: str, signature: dict[str, str], rows: int, features: int, input_size: int, target: str) -> Case:
    shared = _SHARED_KIB[target] << 10
    cut = triton_linear.choose_config(rows, features, input_size, shared)
    block_m = 16 if target == "gfx942" else rows
    blocks = {"K": input_size, "BLOCK_M": block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k}
    return Case(
        name,
        triton_linear.linears_kernel,
        signature,
        blocks,
        {"num_warps": cut.num_warps, "num_stages": cut.num_stages},
        (target,),
    )


for _target in TARGETS:
    CASES += [
        _linear_case("linears_qkv", _QKV, 8, 6144, 4096, _target),
        _linear_case("linears_down", _LINEAR, 16, 4096, 14336, _target),
        _linear_case("linears_qkv_64", _QKV, 64, 6144, 4096, _target),
    ]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn}
_STRIDES = {f"{name}_stride_{size}": "i32:16" for name in ("query", "key", "value") for size in "ht"}
_FIELDS = dict.fromkeys(("block_table", "seq_lens", "cu_seqlens_q", "query_tiles"), "*i32") | {"slot_mapping": "*i64"}
_NUMBERS = dict.fromkeys(("table_stride", "num_tokens", "num_rows"), "i32")
_ATTENTION = _STRIDES | _FIELDS | _NUMBERS | {"inner": "fp32", "multiplier": "fp32"}
# Like Llama-3-8B but for what is given: 32 heads over 8 of 128.
_LLAMA = {
    "HEADS": 8,
    "GROUP": 4,
    "KEY_SIZE": 128,
    "VALUE_SIZE": 128,
    "PAGE_SIZE": 16,
    "SPLITS": 1,
    "SPAN": 0,
    "HAS_SOFTCAP": False,
}


def _attention_case(
    name: str,
    fn: Any,
    target: str,
    dtype: str = "bf16",
    cache: str = "",
    sinks: bool = False,
    slopes: bool = False,
    **given: Any,
) -> Case:
    """A case with the block sizes that the launcher chooses on `target`."""
    constexprs = _LLAMA | given
    assert constexprs.keys() == _LLAMA.keys(), f"{name}: the kernels take no {given.keys() - _LLAMA.keys()}"
    types = _ATTENTION | dict.fromkeys(("query", "key", "value", "out"), f"*{dtype}")
    types |= dict.fromkeys(("key_cache", "value_cache"), f"*{cache or dtype}")
    types |= {"sinks": f"*{dtype}"} if sinks else {}
    types |= {"slopes": "*fp32"} if slopes else {}
    types |= {"part": "*fp32", "part_sums": "*fp32"} if constexprs["SPLITS"] > 1 else {}
    sizes = constexprs["GROUP"], constexprs["KEY_SIZE"], constexprs["VALUE_SIZE"]
    if fn is triton_decode.decode_kernel:
        constexprs |= triton_decode.decode_blocks(*sizes, _DTYPES[cache or dtype], SHARED_BYTES[target])
    else:
        constexprs |= triton_prefill.prefill_blocks(*sizes, _DTYPES[dtype], SHARED_BYTES[target])
    options = {option: constexprs.pop(option) for option in ("num_warps", "num_stages")}
    signature = {arg: types[arg] for arg in fn.arg_names if arg in types}
    return Case(name, fn, signature, {n: v for n, v in constexprs.items() if n in fn.arg_names}, options, (target,))


_GPT_OSS = {"GROUP": 8, "KEY_SIZE": 64, "VALUE_SIZE": 64, "SPAN": 128, "sinks": True}
_GEMMA_2 = {"GROUP": 2, "KEY_SIZE": 256, "VALUE_SIZE": 256, "SPAN": 4096, "HAS_SOFTCAP": True}
for _target in TARGETS:
    for _kind, _fn in (("decode", triton_decode.decode_kernel), ("prefill", triton_prefill.prefill_kernel)):
        CASES += [
            _attention_case(f"{_kind}_llama", _fn, _target),
            _attention_case(f"{_kind}_llama_fp16_page_256", _fn, _target, "fp16", PAGE_SIZE=256),
            _attention_case(f"{_kind}_llama_fp32", _fn, _target, "fp32"),
            _attention_case(f"{_kind}_gpt_oss", _fn, _target, **_GPT_OSS),
            _attention_case(f"{_kind}_llama_4", _fn, _target, GROUP=5, SPAN=-8192),
            _attention_case(f"{_kind}_mpt", _fn, _target, HEADS=32, GROUP=1, slopes=True),
            _attention_case(f"{_kind}_gemma_2", _fn, _target, **_GEMMA_2),
            _attention_case(f"{_kind}_size_80", _fn, _target, HEADS=32, GROUP=1, KEY_SIZE=80, VALUE_SIZE=80),
            _attention_case(f"{_kind}_size_192_value_128", _fn, _target, HEADS=16, GROUP=1, KEY_SIZE=192),
        ]
        # float8_e4m3fn came with compute capability 8.9.
        if _target != "sm_80":
            CASES.append(_attention_case(f"{_kind}_llama_fp8", _fn, _target, cache="fp8e4nv"))
    CASES.append(_attention_case("decode_llama_29_splits", triton_decode.decode_kernel, _target, SPLITS=29))
_COMBINE = {"part": "*fp32", "part_sums": "*fp32", "cu_seqlens_q": "*i32", "out": "*bf16"}
_APPEND = _ATTENTION | dict.fromkeys(("key", "value", "key_cache", "value_cache", "out"), "*bf16")
_APPEND = {name: _APPEND[name] for name in triton_append.append_kernel.arg_names if name in _APPEND}
_WIDTHS = {"BLOCK_D": 128, "BLOCK_E": 128}
CASES += [
    Case(
        "combine_29_splits",
        triton_decode.combine_kernel,
        _COMBINE,
        {"NUM_HEADS": 32, "VALUE_SIZE": 128, "SPLITS": 29, "BLOCK_R": 32, "BLOCK_E": 128},
        {"num_warps": 4},
    ),
    Case("append_llama", triton_append.append_kernel, _APPEND, _LLAMA | _WIDTHS | {"BLOCK_T": 16}, {"num_warps": 4}),
]

# The layers of Llama 3 ask for the first plan; the second has each kind of place, eight KV groups and two windows.
_LLAMA_FIELDS = (
    FieldRequest("position_ids", ()),
    FieldRequest("slot_mapping", (0, 1, 16)),
    FieldRequest("seq_lens", ()),
    FieldRequest("cu_seqlens_q", ()),
    FieldRequest("query_tiles", (32,)),
    FieldRequest("logits_indices", ()),
)
_MANY_FIELDS = (
    *(FieldRequest("slot_mapping", (group, 8, 16)) for group in range(8)),
    *(FieldRequest("kv_page_indices", (group, 8, 16)) for group in range(8)),
    *(FieldRequest("seen_page_indptr", (16, span)) for span in ("window_128", "chunk_4096")),
    *(FieldRequest(name, ()) for name in ("position_ids", "is_token", "token_to_seq", "seq_lens", "has_initial_state")),
    FieldRequest("last_page_len", (16,)),
    FieldRequest("query_tiles", (64,)),
)
_FIELDS = {"layout": "*i32", "arena": "*i32"}
_FIELDS |= dict.fromkeys(("num_rows", "num_tokens", "table_columns", "row_stride"), "i32")
CASES += [
    Case(
        f"fields_{name}_{rows}_rows_{tokens}_tokens",
        triton_fields.fields_kernel,
        _FIELDS,
        {"PLAN": make_plan(requests)} | choose_blocks(rows, tokens),
        {"num_warps": 4},
    )
    for name, requests in (("llama", _LLAMA_FIELDS), ("many", _MANY_FIELDS))
    for rows, tokens in ((64, 64), (512, 512), (1024, 32768))
]
