"""From a loaded transformers causal LM to one FX graph with canonical attention nodes."""

from autodeploy.trace.export import num_positions, trace

__all__ = ["num_positions", "trace"]
