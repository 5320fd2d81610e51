"""Runs Triton kernels on CPU tensors in Triton's interpreter, or on a GPU where there is one.

`TRITON_INTERPRET=1` would settle it for the whole process; here the same functions can also be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, _patch_lang
from triton.runtime.jit import JITFunction

from autodeploy.kernels import support


def _run(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
    InterpretedFunction(kernel.fn).run(*args, **kwargs)


def _call(helper: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return InterpretedFunction(helper.fn).rewrite()(*args, **kwargs)


_create_dot = InterpreterBuilder.create_dot


def _dot(builder: InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter keeps bfloat16 as 16-bit integers, and would multiply those."""
    a, b = (builder.create_fp_ext(x, tl.float32) if x.dtype.scalar is tl.bfloat16 else x for x in (a, b))
    return _create_dot(builder, a, b, *rest)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, launching any kernel interprets it on CPU tensors, and Triton backends support the CPU.

    Kernels call the language's own helpers as functions, tl.sum(x); as methods, x.sum(), they cannot be replaced.
    """
    # The interpreter's own calls of helpers patch the language without ever undoing it.
    scope = _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    devices = support.DEVICE_TYPES | {"cpu"}
    try:
        with (
            patch.object(JITFunction, "run", _run),
            patch.object(JITFunction, "__call__", _call),
            patch.object(InterpreterBuilder, "create_dot", _dot),
            patch.object(support, "DEVICE_TYPES", devices),
        ):
            yield
    finally:
        scope.restore()


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """A device on which a test may launch Triton kernels: a GPU, or the CPU with the interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with interpreted():
        yield torch.device("cpu")
