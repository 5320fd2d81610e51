"""autodeploy: an FX compiler for the attention of language models, with one metadata node for all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autodeploy.compiler.apply import Result, apply, diff
from autodeploy.inductor.torch_compile import last_report, reports
from autodeploy.kernels.registry import register_backend
from autodeploy.metadata.field import field
from autodeploy.metadata.nest import nest_sequences
from autodeploy.runtime.requests import RequestOutput, SamplingParams
from autodeploy.trace import trace
from autodeploy.viz import GraphDiff, Recorder

if TYPE_CHECKING:
    from autodeploy.app.llm import LLM

__all__ = [
    "LLM",
    "GraphDiff",
    "Recorder",
    "RequestOutput",
    "Result",
    "SamplingParams",
    "apply",
    "diff",
    "field",
    "last_report",
    "nest_sequences",
    "register_backend",
    "reports",
    "trace",
]


def __getattr__(name: str) -> Any:
    """`LLM`, imported when it is asked for: it takes 1.5 s, which torch.compile does without."""
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from autodeploy.app.llm import LLM

    return LLM
