"""What each op means. Importing one defines them all, so that graphs that hold them can be made and loaded."""

from autodeploy.ops import attention, causal_conv1d

__all__ = ["attention", "causal_conv1d"]
