"""What the environment says; nothing else in this package reads environment variables."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_LIBRARY_SETTING = re.compile(r"ATEN_CPU_CAPABILITY$|(TRANSFORMERS|USE|KERNELS)_(?!CACHE|OFFLINE|VERBOSITY)")


@dataclass(frozen=True)
class Options:
    """Settings of the machine rather than of one call.

    `cache_dir` holds downloaded and converted models, and compiled steps; `color` is whether terminals may be coloured.
    `library_settings` are the variables by which torch and transformers choose code.
    """

    cache_dir: Path
    color: bool
    library_settings: tuple[tuple[str, str], ...] = ()


def from_environment() -> Options:
    """Options as set by AUTODEPLOY_CACHE (default ~/.cache/autodeploy) and NO_COLOR (https://no-color.org)."""
    cache = os.environ.get("AUTODEPLOY_CACHE") or "~/.cache/autodeploy"
    settings = tuple(sorted(item for item in os.environ.items() if _LIBRARY_SETTING.match(item[0])))
    return Options(Path(os.path.expanduser(cache)).absolute(), not os.environ.get("NO_COLOR"), settings)
