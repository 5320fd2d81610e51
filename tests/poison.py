"""NaN wherever nobody owns a cache, around every step of an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from spans import first
from torch import Tensor

from autodeploy.ops.cache import Cache, Paged
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.scheduler import Batch

# A cache [N, p, *shape] as [N, p, ...] by token: most backends keep it so, one has its pages by head.
ByToken = Callable[[Tensor], Tensor]


def by_token(cache: Tensor) -> Tensor:
    return cache


def by_head(cache: Tensor) -> Tensor:
    """Of pages [K, p, D] in memory that is shaped [p, K, D]; latents [p, D] have no heads."""
    if cache.ndim == 3:
        return cache
    pages, size, heads, width = cache.shape
    return cache.view(pages, heads, size, width).transpose(1, 2)


def poison_each_step(engine: Engine, specs: tuple[Cache, ...], view: ByToken) -> None:
    """Before each step fill what nobody owns with NaN, scratch included; after it, check what has been written.

    That may be the slots of the step's new tokens, the states of its sequences, and scratch.
    """
    compute = engine._compute

    def checked(batch: Batch, *rest: Any) -> Any:
        caches = [view(c) if isinstance(s, Paged) else c for c, s in zip(engine._caches, specs, strict=True)]
        for cache, spec in zip(caches, specs, strict=True):
            cache[~_owned(engine, batch, spec).to(cache.device)] = torch.nan
        before = [cache.clone() for cache in caches]
        result = compute(batch, *rest)
        for cache, old, spec in zip(caches, before, specs, strict=True):
            may_change = _written(engine, batch, spec).to(cache.device)
            same = (cache == old) | (cache.isnan() & old.isnan())
            assert same[~may_change].all(), f"{spec.name}: written outside of the slots of this step"
            may_change[0] = False
            assert cache[may_change].isfinite().all(), f"{spec.name}: NaN in a slot of this step"
        return result

    engine._compute = checked  # type: ignore[method-assign]


def _owned(engine: Engine, batch: Batch, spec: Cache) -> Tensor:
    """[N, p] or [slots] bool: what holds a value that some sequence will read."""
    scheduler = engine._scheduler
    lengths = {request.row: request.num_computed for request in scheduler.running}
    if not isinstance(spec, Paged):
        return _states(engine, [row for row, count in lengths.items() if count])
    span = engine._spec.spans[spec.group]
    slots = [(row, first(span, count), count) for row, count in lengths.items()]
    return _slots(engine, spec.group, slots)


def _written(engine: Engine, batch: Batch, spec: Cache) -> Tensor:
    """[N, p] or [slots] bool: what this step may change, scratch included."""
    rows = batch.rows.tolist()
    if not isinstance(spec, Paged):
        mask = _states(engine, rows)
    else:
        ends = (batch.context_lens + batch.query_lens).tolist()
        mask = _slots(engine, spec.group, list(zip(rows, batch.context_lens.tolist(), ends, strict=True)))
    mask[0] = True
    return mask


def _states(engine: Engine, rows: list[int]) -> Tensor:
    mask = torch.zeros(engine._tables.tables.shape[1] + 1, dtype=torch.bool)
    mask[[row + 1 for row in rows]] = True
    return mask


def _slots(engine: Engine, group: int, spans: list[tuple[int, int, int]]) -> Tensor:
    """The slots of positions first .. end - 1 of each (row, first, end)."""
    pool, size = engine._tables.pools[group], engine._spec.page_size
    mask = torch.zeros(pool.num_pages, size, dtype=torch.bool)
    for row, begin, end in spans:
        positions = np.arange(begin, end)
        mask[torch.as_tensor(pool.table[row, positions // size]), torch.as_tensor(positions % size)] = True
    return mask
