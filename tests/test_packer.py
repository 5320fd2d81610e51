"""The engine's packer against `nest_sequences`, and its arenas against a device that copies late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fake_graphs import WorkGraphs
from hash_model import VOCABULARY, HashModel, assert_nothing_owned, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from spans import SPANS
from torch import Tensor

from autodeploy.errors import OptionError, RequestTooLong
from autodeploy.metadata.nest import Nested, nest_sequences
from autodeploy.runtime.buckets import StepSizes
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.requests import SamplingParams
from autodeploy.runtime.scheduler import Batch
from autodeploy.runtime.staging import NUM_ARENAS, Link, Staging


def check_each_step(engine: Engine) -> list[bool]:
    """Compare each step with what `nest_sequences` packs; the list tells which were updates of an earlier one."""
    packer, tables = engine._packer, engine._tables
    pack, write = packer.pack, packer._write
    updated: list[bool] = []

    def counting(*args: object) -> object:
        updated[-1] = False
        return write(*args)  # type: ignore[arg-type]

    def checked(batch: Batch, sizes: StepSizes, arena: int) -> Nested:
        updated.append(True)
        nested = pack(batch, sizes, arena)
        tokens = [request.tokens[request.num_computed : request.num_tokens] for request in batch.requests]
        expected = nest_sequences(
            np.concatenate([new[:count] for new, count in zip(tokens, batch.query_lens, strict=True)]),
            batch.query_lens,
            [request.num_computed for request in batch.requests],
            tables.tables[:, [request.row for request in batch.requests]],
            [request.row + 1 for request in batch.requests],
            engine._spec,
            num_pages=[pool.num_pages for pool in tables.pools],
            num_state_slots=tables.tables.shape[1] + 1,
            num_logits=batch.num_logits,
            pad_tokens=sizes.num_tokens,
            pad_sequences=sizes.num_sequences,
            pages_per_sequence=sizes.pages_per_sequence,
        )
        assert nested.num_tokens == expected.num_tokens
        assert torch.equal(nested.buffer, expected.buffer)
        assert torch.equal(engine._staging.send(nested).buffer, expected.buffer)
        return nested

    packer.pack, packer._write = checked, counting  # type: ignore[method-assign, assignment]
    return updated


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_step_is_packed_as_nest_sequences_packs_it(data: st.DataObject) -> None:
    """Whatever comes, leaves, is preempted or falls behind a window."""
    model = HashModel(data.draw(st.integers(1, 5)), data.draw(st.sampled_from(SPANS[1:])))
    max_num_seqs = data.draw(st.integers(1, 9))
    engine = make_engine(
        model,
        num_pages=(data.draw(st.integers(4, 40)), data.draw(st.integers(4, 30))),
        max_num_seqs=max_num_seqs,
        max_num_tokens=data.draw(st.integers(max_num_seqs, 24)),
        graphs=WorkGraphs() if data.draw(st.booleans()) else None,
    )
    check_each_step(engine)
    requests = []
    for _ in range(data.draw(st.integers(1, 12))):
        prompt = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
        try:
            requests.append(engine.add(prompt, SamplingParams(max_tokens=data.draw(st.integers(1, 30)))))
        except RequestTooLong:
            continue
        for _ in range(data.draw(st.integers(0, 8))):
            engine.step()
        if data.draw(st.integers(0, 4)) == 0:
            engine.cancel(data.draw(st.sampled_from(requests)))
    while engine.has_work:
        engine.step()
    assert_nothing_owned(engine)


def test_a_decode_step_of_the_same_requests_is_an_update() -> None:
    engine = make_engine(HashModel(page_size=4), num_pages=(80, 80))
    engine.add_many([[1] * 5, [2] * 3], [SamplingParams(max_tokens=30)] * 2)
    updated = check_each_step(engine)
    while engine.has_work:
        engine.step()
    # A prompt, a first decode in each arena, and the same for each larger number of pages (2, 3, 4, 6, 8, 12).
    assert updated.count(False) <= 1 + NUM_ARENAS * 6
    assert sum(updated) > len(updated) // 2


class LateLink(Link):
    """A device that copies when somebody waits for it, as slow as it may be; `pending` is its stream."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.pending: deque[Callable[[], object]] = deque()

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.pending.append(lambda: target.copy_(source))

    def wait(self) -> None:
        self.drain()

    def event(self) -> LateEvent:
        return LateEvent(self)

    def drain(self, keep: int = 0) -> None:
        while len(self.pending) > keep:
            self.pending.popleft()()


class LateEvent:
    def __init__(self, link: LateLink) -> None:
        self.link = link
        self.reached = True

    def record(self) -> None:
        self.reached = False
        self.link.pending.append(lambda: setattr(self, "reached", True))

    def synchronize(self) -> None:
        while not self.reached:
            self.link.pending.popleft()()


def stream_steps(staging: Staging, link: LateLink, count: int) -> list[int]:
    """Send steps of the tokens 0, 1, 2, ...; what each of them finds on the device."""
    seen: list[int] = []
    for number in range(count):
        arena = staging.arenas[staging.next_arena()]
        nested = arena.view(2, 2, 3)
        nested.buffer.fill_(number)
        sent = staging.send(nested)
        link.pending.append(lambda sent=sent: seen.append(int(sent.layout[0, 0])))
    link.drain()
    return seen


def test_no_arena_is_written_before_its_copy_has_ended() -> None:
    link = LateLink()
    assert stream_steps(Staging(link, 4, 4, 3), link, 7) == list(range(7))


def test_the_device_is_late_enough_to_show_a_missing_wait() -> None:
    link = LateLink()
    staging = Staging(link, 4, 4, 3)
    for event in staging._events:
        event.synchronize = lambda: None  # type: ignore[method-assign]
    assert stream_steps(staging, link, 7) != list(range(7))


def replay_steps(staging: Staging, link: LateLink, count: int) -> list[int]:
    """The same by graphs, by a host that does not wait for a step's tokens, as after an error."""
    seen: list[int] = []
    for number in range(count):
        nested = staging.arenas[staging.graph_arena()].view(2, 2, 3)
        nested.buffer.fill_(number)
        sent = staging.copy(nested)
        link.pending.append(lambda sent=sent: seen.append(int(sent.layout[0, 0])))
    link.drain()
    return seen


def test_the_arena_of_graphs_is_not_written_before_its_step_has_ended() -> None:
    link = LateLink()
    assert replay_steps(Staging(link, 4, 4, 3), link, 5) == list(range(5))


def test_the_device_is_late_enough_to_show_a_missing_wait_for_a_graph() -> None:
    link = LateLink()
    staging = Staging(link, 4, 4, 3)
    staging.graph_arena = lambda: len(staging.arenas) - 1  # type: ignore[method-assign]
    assert replay_steps(staging, link, 5) != list(range(5))


def test_a_device_that_is_not_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(OptionError, match=r"is on cuda:1, .* is cuda:0\n.*set_device\(1\)"):
        Link(torch.device("cuda", 1))


def test_the_host_is_ahead_by_as_many_steps_as_there_are_arenas() -> None:
    link = LateLink()
    staging = Staging(link, 4, 4, 3)
    for number in range(NUM_ARENAS):
        staging.send(staging.arenas[staging.next_arena()].view(2, 2, 3))
        assert sum(1 for _ in link.pending) == 2 * (number + 1), "the host waited"
