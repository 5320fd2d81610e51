"""Two compilations side by side, each in a process of its own, and their steps in turns.

A script calls `compare` in its own process and `serve` in a worker's. Both workers compile at the same time with empty
caches and one thread: a busy machine slows both alike, and seconds of the processor are the steadier measure there.
Left out of the seconds, and the same for both: imports, and Inductor's check that the compiler knows the processor's
vector instructions.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from measure import Watched, watch_inductor
from torch import Tensor

ROUNDS, BLOCK_SECONDS = 15, 0.05
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}


class WorkerError(Exception):
    """The end of what a worker wrote before it died."""


class Worker:
    """This script in another process, with `--worker` and `arguments`, under `serve`."""

    def __init__(self, folder: Path, arguments: Sequence[object]) -> None:
        folder.mkdir()
        self._result = folder / "result.pt"
        self._log = (folder / "log").open("w+")
        command = [sys.executable, sys.argv[0], "--worker", *map(str, arguments), str(self._result)]
        self._process = subprocess.Popen(
            command,
            env=os.environ | _ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._commands, self._answers = self._process.stdin, self._process.stdout

    def ask(self, command: str) -> None:
        print(command, file=self._commands, flush=True)

    def answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._log.seek(0)
            raise WorkerError("".join(self._log.readlines()[-8:]).strip())
        return json.loads(line)

    def step_ms(self, count: int) -> float:
        """Median of `count` steps."""
        self.ask(f"steps {count}")
        return 1e3 * statistics.median(self.answer())

    def result(self) -> Tensor:
        """What the first step gave."""
        return torch.load(self._result)

    def close(self) -> None:
        self._process.communicate()
        self._log.close()


@contextmanager
def started(*arguments: Sequence[object]) -> Iterator[list[Worker]]:
    """A worker for each of `arguments`, their imports done."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(Path(folder) / str(index), given) for index, given in enumerate(arguments)]
        try:
            for worker in workers:
                worker.answer()
            yield workers
        finally:
            for worker in workers:
                worker.close()


def compare(names: Sequence[str], first: Worker, second: Worker) -> dict[str, Any]:
    """Compile in both at once, then run steps in turns; each figure by name.

    `step_ratio` is the time of the second over the first, `step_noise` of the first over itself in the same rounds:
    [lower quartile, median, upper quartile]. `difference` is the largest between the results, of the size of `scale`.
    """
    for worker in (first, second):
        worker.ask("compile")
    compiled = [worker.answer() for worker in (first, second)]
    found: dict[str, Any] = {
        key: dict(zip(names, (figures[key] for figures in compiled), strict=True)) for key in compiled[0]
    }
    expected, result = first.result(), second.result()
    difference = {"difference": float((expected - result).abs().max()), "scale": float(expected.abs().max())}
    return found | _take_turns(names, first, second) | difference


def _take_turns(names: Sequence[str], first: Worker, second: Worker) -> dict[str, Any]:
    """In each round a block of steps of the first, two of the second, one of the first."""
    count = max(3, round(1e3 * BLOCK_SECONDS / first.step_ms(5)))
    rounds = [[worker.step_ms(count) for worker in (first, second, second, first)] for _ in range(ROUNDS)]
    of_first = chain.from_iterable((start, end) for start, _, _, end in rounds)
    of_second = chain.from_iterable((start, end) for _, start, end, _ in rounds)
    return {
        "step_ms": {
            name: round(statistics.median(blocks), 4) for name, blocks in zip(names, (of_first, of_second), strict=True)
        },
        "step_ratio": _quartiles([(b1 + b2) / (a1 + a2) for a1, b1, b2, a2 in rounds]),
        "step_noise": _quartiles([a2 / a1 for a1, _, _, a2 in rounds]),
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def serve(
    result_file: str, compile_step: Callable[[], Callable[[], Tensor]], describe: Callable[[Watched], dict[str, Any]]
) -> None:
    """The worker's side: a JSON line when ready, and one for each line read, until there are no more.

    `compile_step` compiles, runs the first step if that is what compiles, and returns the step; `describe` makes
    further figures of what Inductor did.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may print there
    _say(answers, "ready")
    step: Callable[[], Tensor] | None = None
    for line in sys.stdin:
        if step:
            _say(answers, [_seconds_of(step) for _ in range(int(line.split()[1]))])
            continue
        start, processor_start = time.perf_counter(), _processor_seconds()
        with watch_inductor() as watched:
            step = compile_step()
        figures = {
            "compile_seconds": round(time.perf_counter() - start, 2),
            "compile_processor_seconds": round(_processor_seconds() - processor_start, 2),
            "kernels": watched.num_kernels(),
        }
        torch.save(step(), result_file)
        _say(answers, figures | describe(watched))


def _say(answers: IO[str], data: Any) -> None:
    print(json.dumps(data), file=answers, flush=True)


def _seconds_of(step: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _processor_seconds() -> float:
    """User and system time of this process and of the compilers that it ran."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
