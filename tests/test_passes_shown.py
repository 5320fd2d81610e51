"""What each pass does, as the graph diff shows it: one small model with one attention, from its export on.

Read top to bottom, this is the way of an attention node. `python tests/test_passes_shown.py` prints it as it is now.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from autodeploy.compiler import pipeline
from autodeploy.graph.edit import copy_module
from autodeploy.trace.aten import from_export
from autodeploy.viz.diff import GraphDiff
from passes import default

SHOWN = {
    "canonicalize": """
        - _assert_tensor_metadata
        - to
    """,
    "find_attention": """
        - scaled_dot_product_attention, + transpose, attention
    """,
    "find_latent_attention": "",
    "nest_inputs": """
        ~ placeholder input_ids (role (none) -> tokens; shape [s, s] -> [T]; dtype int64 -> int32)
        + placeholder layout
        + cu_seqlens_q
        ~ attention (cu_seqlens (absent) -> cu_seqlens_q_default)
        embedding: + unsqueeze
        embedding: + to
        embedding: - placeholder position_ids, + to, unsqueeze, position_ids, sym_size
    """,
    "gather_logits": """
        head: + logits_indices
        head: + index_select
        head: ~ linear (shape [1, T, 16] -> [1, S, 16])
        + squeeze
    """,
    "insert_cached_attention": """
        + placeholder key_*
        + placeholder value_*
        + sym_size
        + slot_mapping
        2 x + reference_append
        - attention, + reference_paged_attention, seq_lens, block_table
    """,
    "share_metadata": """
        + call_module prepare_metadata
        = sym_size for 1 duplicates
        2 x < reference_append (reads 1 of prepare_metadata)
        < reference_paged_attention (reads 3 of prepare_metadata)
        < add (reads 1 of prepare_metadata)
        + placeholder layout
        6 x prepare_metadata: + getitem
        prepare_metadata: > position_ids (graph (none) -> prepare_metadata)
        2 x prepare_metadata: > unsqueeze (graph (none) -> prepare_metadata)
        prepare_metadata: > to (graph (none) -> prepare_metadata)
        prepare_metadata: > slot_mapping (graph (none) -> prepare_metadata)
        prepare_metadata: > block_table (graph (none) -> prepare_metadata)
        prepare_metadata: > seq_lens (graph (none) -> prepare_metadata)
        prepare_metadata: > cu_seqlens_q (graph (none) -> prepare_metadata)
        prepare_metadata: > logits_indices (graph (none) -> prepare_metadata)
        prepare_metadata: + output
        head: < index_select (reads 1 of prepare_metadata)
        embedding: + placeholder sym_size_int
    """,
    "lower_fields": """
        2 x prepare_metadata: + getattr
        prepare_metadata: + arange
        4 x prepare_metadata: + getitem
        prepare_metadata: + searchsorted
        2 x prepare_metadata: + sub
        prepare_metadata: + clamp
        prepare_metadata: + lt
        prepare_metadata: - position_ids, + where, add, 2 getitem, sub
        prepare_metadata: - slot_mapping, + where, add, mod, ... (7 nodes)
        prepare_metadata: - block_table, + 2 getitem, 2 add, 2 mul, ... (8 nodes)
        prepare_metadata: - seq_lens, + add
        prepare_metadata: - cu_seqlens_q, + pad, cumsum
        prepare_metadata: - logits_indices, + to, 2 clamp, minimum, ... (13 nodes)
    """,
    "lower_linear": """
        head: ~ linear (target aten.linear.default -> autodeploy.linear.default)
    """,
}


class Model(nn.Module):
    """An embedding, one attention that the model writes itself, positions added, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).float()
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        attended = scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.head(x + attended.transpose(1, 2).flatten(2) + position_ids.unsqueeze(-1))


def stages() -> Iterator[tuple[str, fx.GraphModule, fx.GraphModule]]:
    """(pass, graph before, graph after)."""
    inputs = {"input_ids": torch.zeros(3, 12, dtype=torch.int64), "position_ids": torch.arange(12).repeat(3, 1)}
    dims = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(Model(), (), inputs, dynamic_shapes=dims, strict=False)
    gm = from_export(program)
    for step in default(backend="reference", page_size=4):
        before = copy_module(gm)
        pipeline.run(gm, [step])
        yield step.name, before, gm


def shown(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    """The lines of the diff, with all symbols for padded sizes called s."""
    return [re.sub(r"\bs\d+\b", "s", line) for line in GraphDiff.of(before, after).lines()]


@pytest.mark.parametrize("name", [step.name for step in default()])
def test_shown(name: str) -> None:
    before, after = next((before, after) for found, before, after in stages() if found == name)
    assert shown(before, after) == [line.strip() for line in SHOWN[name].strip().splitlines()]


if __name__ == "__main__":
    for name, before, after in stages():
        print(f'    "{name}": """')
        print("\n".join(f"        {line}" for line in shown(before, after)))
        print('    """,')
