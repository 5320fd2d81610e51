"""Coverage as a reader sees it: tables for a terminal, and the page of the docs for all model types."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from textwrap import shorten

from autodeploy.app.coverage import Coverage, LayerCoverage, Refusal
from autodeploy.compiler.report import near_miss_lines
from autodeploy.viz.table import table

_HEADING = ("layers", "kind", "span", "backend", "bytes/token", "bytes/sequence")
_LONGEST = 300  # characters of a reason in a row
_INTRODUCTION = """\
# Coverage

What becomes of types of causal language models of transformers {transformers}, with torch {torch}. Made by

```
autodeploy coverage --zoo --markdown docs/coverage.md
```

from tiny models in float32 with random weights, whose defaults are shrunk by the names of their fields, on a CPU. A
type is listed as served where its graph went through all passes; that its tokens are equal to transformers' is tested
elsewhere. Bytes are those of the cache of one layer of the tiny model.
"""


def coverage_lines(found: Coverage) -> list[str]:
    """A heading, a row for all layers that are alike, what they weigh together and read, and what was refused."""
    status = "refused" if found.refusal else "served"
    lines = [f"{found.model}: {status} ({found.seconds:.1f} s)"]
    groups = alike(found.layers)
    rows = [(_name(group), *_facts(group[0])) for group in groups]
    if rows:
        lines += table([_HEADING, *rows], indent=2)
    lines += [f"  caches: {line}" for line in dict.fromkeys(_caches(group[0]) for group in groups) if line]
    lines += [
        f"  fields of {group[0].backend} ({group[0].kind}): {', '.join(group[0].fields)}"
        for group in _distinct_fields(groups)
    ]
    if rows and not found.refusal:
        totals = (sum(layer.num_bytes(owner) for layer in found.layers) for owner in ("token", "sequence"))
        lines.append("  together {} bytes per token, {} per sequence".format(*totals))
    for name in dict.fromkeys(name for name, _ in found.near_misses):
        lines += near_miss_lines(name, [miss for of, miss in found.near_misses if of == name])
    return lines + _refusal_lines(found)


def _refusal_lines(found: Coverage) -> list[str]:
    refusals = {layer.refusal: layer.path for layer in found.layers if layer.refusal}
    if found.refusal:
        refusals.setdefault(found.refusal, found.refusal.where)
    return [line for refusal in refusals for line in _parts(refusal)]


def _parts(refusal: Refusal) -> list[str]:
    place = f" in {refusal.pass_name}" if refusal.pass_name else ""
    parts = {"where": refusal.where, "fix": refusal.fix}
    return [
        f"  {refusal.error}{place}: {refusal.what}",
        *(f"    {name + ':':7}{text}" for name, text in parts.items() if text),
    ]


def alike(layers: Iterable[LayerCoverage]) -> list[list[LayerCoverage]]:
    """Layers by what they are, in the order in which each sort comes first; paths do not matter."""
    groups: dict[LayerCoverage, list[LayerCoverage]] = {}
    for layer in layers:
        refusal = layer.refusal and replace(layer.refusal, where="")
        of = _starred([layer.caches_of])
        groups.setdefault(replace(layer, path="", caches_of=of, refusal=refusal), []).append(layer)
    return list(groups.values())


def _distinct_fields(groups: Sequence[list[LayerCoverage]]) -> list[list[LayerCoverage]]:
    with_fields = [group for group in groups if group[0].fields]
    key = [(group[0].kind, group[0].backend, group[0].fields) for group in with_fields]
    return [group for index, group in enumerate(with_fields) if key[index] not in key[:index]]


def _name(group: Sequence[LayerCoverage]) -> str:
    count = f"{len(group)} x " if len(group) > 1 else ""
    return count + _starred([layer.path for layer in group])


def _starred(paths: Sequence[str]) -> str:
    """One name for all: numbers that differ become stars."""
    names = list(dict.fromkeys(paths))
    if len(names) == 1:
        return names[0]
    return ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def _facts(layer: LayerCoverage) -> tuple[str, ...]:
    if layer.refusal:
        return layer.kind, layer.span, "refused", "", ""
    if layer.caches_of:
        return layer.kind, layer.span, layer.backend, f"of {layer.caches_of}", ""
    numbers = (layer.num_bytes(owner) for owner in ("token", "sequence"))
    return layer.kind, layer.span, layer.backend, *(str(number or "-") for number in numbers)


def _caches(layer: LayerCoverage) -> str:
    return ", ".join(f"{cache.name} {list(cache.shape)} {cache.dtype} per {cache.owner}" for cache in layer.caches)


def markdown(found: Sequence[Coverage]) -> str:
    """The page of the docs: those that are served, the fields that their backends read, and the rest with reasons."""
    versions = dict(found[0].versions) if found else {"transformers": "-", "torch": "-"}
    served = [each for each in found if not each.refusal]
    refused = [each for each in found if each.refusal]
    rows = [
        (each.model if first else "", f"{len(group)} x {_short(group[0])}", *_facts(group[0])[2:])
        for each in served
        for first, group in ((group is groups[0], group) for groups in [alike(each.layers)] for group in groups)
    ]
    fields = {
        (group[0].kind, group[0].backend, ", ".join(group[0].fields)): None
        for each in served
        for group in alike(each.layers)
    }
    refusals = [(each.model, reason(each.refusal), f"{each.seconds:.0f}") for each in refused if each.refusal]
    parts = [
        _INTRODUCTION.format(**versions),
        f"## Served: {len(served)} of {len(found)}\n",
        _grid(("type", "layers", "backend", "bytes per token", "bytes per sequence"), rows),
        "\n## Fields that they read\n",
        _grid(("kind", "backend", "fields"), sorted(fields)),
        f"\n## Refused: {len(refused)}\n",
        _grid(("type", "reason", "seconds"), refusals),
    ]
    return "\n".join(parts) + "\n"


def _short(layer: LayerCoverage) -> str:
    return (
        f"{layer.kind}, {layer.span}"
        if layer.caches_of or any(c.owner == "token" for c in layer.caches)
        else layer.kind
    )


def reason(refusal: Refusal) -> str:
    """In one line of some length, without folders of this machine."""
    text = f"{refusal.error}: {refusal.what}" + (f" ({refusal.where})" if refusal.where else "")
    return shorten(re.sub(r'File "[^"]*/', 'File "', text), _LONGEST, placeholder=" ...")


def _grid(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [heading, ["---"] * len(heading), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row) + " |" for row in cells
    )
