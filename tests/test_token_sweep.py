"""What `nest_inputs` accepts keeps tokens apart: torch's own operators, and random models, asked by running them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from test_mixing import ALLOWED, COUNTS_PLACES, MIXES, SIZE, Body, traced
from token_sweep import cases, examine

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.tokens import token_flow
from passes import FindAttention, NestInputs

ATTENTION = torch.ops.autodeploy.attention.default


@pytest.mark.filterwarnings("ignore")
def test_operators_that_are_accepted_keep_tokens_apart() -> None:
    """A portion; `python tests/token_sweep.py` asks all of them."""
    counts = Counter(examine(function, sample, dim) for _, function, sample, dim in cases(every=60, offset=5))
    assert counts["leaks"] == 0
    assert counts["apart"] > 10


def _chain(generator: random.Random, *bodies: Body) -> Body:
    """`bodies` in order, among harmless ones."""
    harmless = [body for name, body in ALLOWED.items() if name != "routing"]  # which trusts itself to restore the order
    steps = [step for body in bodies for step in (*generator.sample(harmless, 2), body)]
    steps += generator.sample(harmless, 1)

    def run(hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        for step in steps:
            hidden = step(hidden, position_ids).reshape(hidden.shape[0], -1, SIZE)
        return hidden

    return run


@pytest.mark.parametrize("seed", range(4))
def test_a_mixing_op_anywhere_in_a_model_is_refused(seed: int) -> None:
    generator = random.Random(seed)
    body, _ = generator.choice([*MIXES.values(), *((body, "") for body in COUNTS_PLACES.values())])
    gm = traced(_chain(generator, body))
    FindAttention().apply(gm)
    with pytest.raises(UnsupportedFeature):
        NestInputs().apply(gm)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_is_accepted_keeps_tokens_apart(seed: int) -> None:
    gm = traced(_chain(random.Random(seed)))
    FindAttention().apply(gm)
    assert token_flow(gm, gm.graph.find_nodes(op="call_function", target=ATTENTION)).mixing == []
    (attention,) = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    attention.kwargs = {**attention.kwargs, "span": "window_1"}  # sees itself alone
    gm.recompile()
    ids, positions = torch.zeros(2, 6, dtype=torch.int64), torch.arange(6).repeat(2, 1)
    before = gm(input_ids=ids, position_ids=positions)
    ids[0, 3] = 1
    changed = (gm(input_ids=ids, position_ids=positions) != before).any(-1)
    changed[0, 3] = False
    assert not changed.any()
