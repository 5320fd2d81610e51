"""autodeploy: an FX compiler for the attention of language models, with one metadata node for all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autodeploy.backend import Result, apply
from autodeploy.dynamo import last_report, reports
from autodeploy.metadata.fields import field
from autodeploy.metadata.nest import nest_sequences
from autodeploy.ops.registry import register_backend
from autodeploy.runtime.requests import RequestOutput, SamplingParams
from autodeploy.trace import trace

if TYPE_CHECKING:
    from autodeploy.llm import LLM

__all__ = [
    "LLM",
    "RequestOutput",
    "Result",
    "SamplingParams",
    "apply",
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
    from autodeploy.llm import LLM

    return LLM
