"""The paged CPU backend: torch's fused scaled dot product attention over gathered pages."""

from __future__ import annotations

from autodeploy.ops.spec import Backend

BACKENDS: tuple[Backend, ...] = ()
