"""Runs trials in processes of their own: on some odd arguments torch ends the process, which must not be ours."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from typing import Any

import torch
from sharing_trials import Outcome, quiet

_MAX_BYTES = 8 << 30  # of address space: odd sizes must not take the machine's memory
_fork: Any = multiprocessing.get_context("fork")


def run(trial: Callable[[int], Outcome], numbers: range) -> Outcome:
    """All trials of a portion, going on behind each that ends the process."""
    outcome = Outcome()
    first = numbers.start
    while first < numbers.stop:
        at = _fork.Value("q", first - numbers.step)
        receives, sends = _fork.Pipe(duplex=False)
        process = _fork.Process(target=_run_here, args=(trial, range(first, numbers.stop, numbers.step), at, sends))
        process.start()
        sends.close()
        while True:
            try:
                outcome.add(receives.recv())
            except EOFError:
                break
        process.join()
        first = at.value + numbers.step
        if process.exitcode != 0:
            outcome.ended.append(f"trial {at.value} by signal {-process.exitcode}")
    return outcome


def _run_here(trial: Callable[[int], Outcome], numbers: range, at: Any, sends: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch's C++ warns past Python
    with quiet():
        for number in numbers:
            at.value = number
            sends.send(trial(number))
    sends.close()
    os._exit(0)  # without what the parent registered to be done at its own end
