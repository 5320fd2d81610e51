"""autodeploy: an FX compiler for the attention of language models, with one metadata node for all of it."""

from autodeploy.backend import Result, apply
from autodeploy.dynamo import last_report, reports
from autodeploy.llm import LLM
from autodeploy.metadata.fields import field
from autodeploy.metadata.nest import nest_sequences
from autodeploy.ops.registry import register_backend
from autodeploy.runtime.requests import RequestOutput, SamplingParams
from autodeploy.trace import trace

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
