"""Packs the batches of an engine, and in a decode step only what has changed.

What `nest_sequences` would pack of the same batch, byte for byte, without its checks: the engine's block tables give
each page one owner by construction, and hold 0 wherever a step neither reads nor writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autodeploy.metadata.layout import CONTEXT_LEN, NUM_FIXED_COLUMNS, LayoutSpec
from autodeploy.metadata.nest import Nested, write_step
from autodeploy.runtime.buckets import StepSizes
from autodeploy.runtime.pages import BlockTables
from autodeploy.runtime.scheduler import Batch
from autodeploy.runtime.sequences import Sequences
from autodeploy.runtime.staging import Staging


@dataclass
class _Packed:
    """What an arena holds: the step `nested` of `batch`, up to the first `num_changes` changes of its tables.

    The rest are views of it: `token_ids` [sum of query_lens], `context_lens` [n], `tables` [n, G, P].
    """

    batch: Batch
    sizes: StepSizes
    nested: Nested
    num_changes: int
    token_ids: np.ndarray
    context_lens: np.ndarray
    tables: np.ndarray


class Packer:
    """Writes steps into the arenas of `staging`, and remembers what each of them holds."""

    def __init__(self, staging: Staging, tables: BlockTables, sequences: Sequences) -> None:
        self._staging = staging
        self._tables = tables
        self._sequences = sequences
        self._spec: LayoutSpec = tables.spec
        self._packed: list[_Packed | None] = [None] * len(staging.arenas)

    def pack(self, batch: Batch, sizes: StepSizes, arena: int) -> Nested:
        """The step of `batch`, in the arena of number `arena`."""
        packed = self._packed[arena]
        if packed is None or packed.batch is not batch or packed.sizes != sizes:
            self._packed[arena] = None
            packed = self._packed[arena] = self._write(batch, sizes, arena)
        else:
            self._update(packed)
        return packed.nested

    def _write(self, batch: Batch, sizes: StepSizes, arena: int) -> _Packed:
        """Everything anew."""
        num_columns = self._spec.num_columns(sizes.pages_per_sequence)
        nested = self._staging.arenas[arena].view(sizes.num_tokens, sizes.num_sequences, num_columns)
        tables = self._tables.tables[:, batch.rows, : sizes.pages_per_sequence]
        columns = (batch.query_lens, batch.context_lens, batch.rows + 1, batch.num_logits)
        write_step(nested, self._token_ids(batch), *columns, list(tables))
        rows = nested.layout.numpy()[: len(batch.rows)]
        shape = (len(batch.rows), self._spec.num_groups, sizes.pages_per_sequence)
        views = rows[:, CONTEXT_LEN], rows[:, NUM_FIXED_COLUMNS:].reshape(shape)
        assert not views[1].size or np.shares_memory(views[1], rows)
        return _Packed(batch, sizes, nested, len(batch.changes), nested.input_ids.numpy()[: batch.num_tokens], *views)

    def _update(self, packed: _Packed) -> None:
        """The same sequences, one or more tokens further."""
        batch = packed.batch
        packed.token_ids[:] = self._token_ids(batch)
        packed.context_lens[:] = batch.context_lens
        for change in batch.changes[packed.num_changes :]:
            packed.tables[change.sequences, change.groups, change.entries] = change.pages
        packed.num_changes = len(batch.changes)

    def _token_ids(self, batch: Batch) -> np.ndarray:
        tokens = self._sequences.tokens
        if batch.is_decode:
            return tokens[batch.rows, batch.context_lens]
        spans = zip(batch.rows.tolist(), batch.context_lens.tolist(), batch.query_lens.tolist(), strict=True)
        return np.concatenate([tokens[row, context : context + new] for row, context, new in spans])
