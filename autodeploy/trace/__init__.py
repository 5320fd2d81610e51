"""From a loaded transformers causal LM to one FX graph with canonical attention nodes."""

from autodeploy.trace.export import trace

__all__ = ["trace"]
