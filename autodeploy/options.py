"""What the environment says; nothing else in this package reads environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Settings of the machine rather than of one call.

    `cache_dir` holds downloaded and converted models; `color` is whether terminals may be coloured.
    """

    cache_dir: Path
    color: bool


def from_environment() -> Options:
    """Options as set by AUTODEPLOY_CACHE (default ~/.cache/autodeploy) and NO_COLOR (https://no-color.org)."""
    cache = os.environ.get("AUTODEPLOY_CACHE") or "~/.cache/autodeploy"
    return Options(cache_dir=Path(os.path.expanduser(cache)).absolute(), color=not os.environ.get("NO_COLOR"))
