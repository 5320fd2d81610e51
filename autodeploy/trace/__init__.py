"""From a loaded transformers causal LM to one FX graph with canonical attention nodes."""

from autodeploy.trace.export import TRACE_SECONDS, trace

__all__ = ["TRACE_SECONDS", "trace"]
