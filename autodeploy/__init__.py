"""autodeploy: an FX compiler for the attention of language models, with one metadata node for all of it."""

from autodeploy.backend import Result, apply, diff
from autodeploy.dynamo import last_report, reports
from autodeploy.llm import LLM
from autodeploy.metadata.fields import field
from autodeploy.metadata.nest import nest_sequences
from autodeploy.ops.registry import register_backend
from autodeploy.runtime.requests import RequestOutput, SamplingParams
from autodeploy.trace import trace
from autodeploy.viz import GraphDiff, Recorder

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
