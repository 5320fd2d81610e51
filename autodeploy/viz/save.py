"""Which ending of a file name stands for which format; other endings are refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autodeploy.errors import OptionError


def write(path: str | Path, shown: Any, writers: Mapping[str, Callable[[Any], str]]) -> None:
    """Write `shown` in the format of the path's ending. Raises OptionError for an ending that is not in `writers`."""
    path = Path(path)
    for ending, text_of in writers.items():
        if path.name.endswith(ending):
            path.write_text(text_of(shown), encoding="utf-8")
            return
    what = type(shown).__name__
    raise OptionError(f"cannot save a {what} as {path.name!r}", fix=f"end it with {', '.join(writers)}")


def as_json(shown: Any) -> str:
    """`shown.to_json()` as text."""
    return json.dumps(shown.to_json(), indent=1) + "\n"
