"""A small portion of the soak; the script runs as much as one likes."""

from __future__ import annotations

import logging

import pytest
from soak import ASKS, LOADS, soak


@pytest.mark.parametrize(("model", "num_requests"), [("hash", 300), ("llama", 80)])
def test_nothing_is_left_and_answers_are_right(model: str, num_requests: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "autodeploy")
    load = LOADS[model]()
    soak(load, num_requests, num_threads=4, seed=1)
    assert load.engine.stats.num_preemptions > 0
    assert len(load.counts) == len(ASKS)
    assert load.engine.stats.num_failed_steps > 0 or model != "hash"
