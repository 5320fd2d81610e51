"""`autodeploy coverage`: of models that are named, or of every model type, each in a process of its own.

What is found of a type is a line of JSON, appended as soon as it is known. A run that was stopped goes on where it
was; lines of other versions of torch, transformers or this package do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from autodeploy.app.coverage import (
    MODEL_TYPES,
    VERSIONS,
    CacheUse,
    Coverage,
    LayerCoverage,
    Refusal,
    coverage,
)
from autodeploy.app.coverage_text import coverage_lines, markdown, reason
from autodeploy.app.models import print_progress
from autodeploy.compiler.pipeline import NearMiss
from autodeploy.errors import UnknownName

_LAST_LINES = 3  # of what a process that died has said


def from_json(data: dict[str, Any]) -> Coverage:
    """The coverage that `to_json` wrote, without its ledger."""
    layers = tuple(_layer(layer) for layer in data["layers"])
    misses = tuple((name, NearMiss(**miss)) for name, miss in data["near_misses"])
    parsed = {"layers": layers, "near_misses": misses, "refusal": _refusal(data["refusal"]), "ledger": None}
    return Coverage(**data | parsed)


def _layer(data: dict[str, Any]) -> LayerCoverage:
    caches = tuple(CacheUse(**cache | {"shape": tuple(cache["shape"])}) for cache in data["caches"])
    parsed = {"caches": caches, "fields": tuple(data["fields"]), "refusal": _refusal(data["refusal"])}
    return LayerCoverage(**data | parsed)


def _refusal(data: dict[str, Any] | None) -> Refusal | None:
    return None if data is None else Refusal(**data)


def cover_types(
    types: Sequence[str], results: Path, limit_seconds: float, progress: Callable[[str], None]
) -> list[Coverage]:
    """The coverage of each of `types`, all where there are none, read from or appended to the JSON lines in `results`.

    Raises UnknownName before anything runs, and OSError where `results` cannot be written.
    """
    types = types or MODEL_TYPES
    for unknown in (name for name in types if name not in MODEL_TYPES):
        raise UnknownName("model type", unknown, MODEL_TYPES)
    known = dict(_known(results))
    for number, model_type in enumerate(types, start=1):
        if model_type in known:
            continue
        data = _in_process(model_type, limit_seconds)
        with results.open("a", encoding="utf-8") as lines:
            # A run that was stopped may have left half a line.
            lines.write(f"\n{json.dumps(data)}\n")
        known[model_type] = from_json(data)
        progress(f"{number}/{len(types)} {model_type}: {_outcome(known[model_type])}")
    return [known[model_type] for model_type in types]


def _known(results: Path) -> Iterator[tuple[str, Coverage]]:
    """What an earlier run has found, by type; a last line that was cut off is no line."""
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        try:
            found = from_json(json.loads(line))
        except (ValueError, TypeError, KeyError):
            continue
        if found.versions == VERSIONS:
            yield found.model, found


def _outcome(found: Coverage) -> str:
    return reason(found.refusal) if found.refusal else f"{len(found.layers)} layers"


def _in_process(model_type: str, limit_seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "autodeploy", "coverage", "--json", model_type]
    start = time.perf_counter()
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, check=False)
    except subprocess.TimeoutExpired:
        refusal = Refusal("TimeLimit", f"not done in {limit_seconds:g} s")
    else:
        with suppress(ValueError):
            return json.loads(process.stdout)[0]
        said = " ".join(process.stderr.strip().splitlines()[-_LAST_LINES:])
        refusal = Refusal("Crash", f"its process ended with {process.returncode}: {said}")
    return Coverage(model_type, VERSIONS, round(time.perf_counter() - start, 2), refusal=refusal).to_json()


def run(args: argparse.Namespace, backend: Any, dtype: Any) -> int:
    """The command; 1 where something was refused."""

    if args.zoo:
        found = cover_types(args.models, args.results, args.limit, print_progress)
        summary = [f"{len(found)} types, {sum(not each.refusal for each in found)} served"]
    else:
        found, summary = [coverage(model, backend, dtype=dtype, page_size=args.page_size) for model in args.models], []
    if args.markdown:
        args.markdown.write_text(markdown(found), encoding="utf-8")
    if args.json:
        print(json.dumps([each.to_json() for each in found], indent=None if args.zoo else 2))
    elif summary:
        print("\n".join(summary))
    else:
        print("\n\n".join("\n".join(coverage_lines(each)) for each in found))
    return int(any(each.refusal for each in found))
