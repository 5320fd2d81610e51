"""How many small wrong edits of the passes' own code the tests notice: `python tests/mutants.py --count 200 --seed 0`.

Each mutant is a fork of a process that has loaded torch and transformers. It runs the tests that know its module best,
until the first that fails. One that hangs or dies is noticed, too, and said so.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import types
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
from mutations import Edit, edits

ROOT = Path(__file__).parents[1]
PRELOADED = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "transformers", "hypothesis.strategies", "numpy")


class Part(NamedTuple):
    """Files of the package, the tests that know them best, the fastest first, and those that take longer.

    `slow` are words in the names of single tests of `tests`, and further files.
    """

    paths: list[str]
    tests: list[str]
    slow: list[str]


def _part(names: str, tests: str, slow: str = "") -> Part:
    return Part([f"autodeploy/{name}.py" for name in names.split()], tests.split(), slow.split())


_SHARING = "test_memory test_fuzz_completeness test_passes_share_metadata"
_SLOW = "get_one_node random_graphs test_sharing_proved"
PARTS = [
    _part("graph/equality", f"test_equality {_SHARING}", _SLOW),
    _part("graph/effects graph/spelling", f"test_effects {_SHARING}", _SLOW),
    _part("graph/aliasing", f"test_effects test_equality test_aliasing {_SHARING}", _SLOW),
    _part("graph/dependence", f"test_effects {_SHARING}", _SLOW),
    _part("graph/outline", _SHARING, _SLOW),
    _part("graph/tokens", "test_mixing test_token_sweep", "test_passes_nest_inputs"),
    _part(
        "inductor/step_cache inductor/step_files inductor/fingerprint inductor/graph_key inductor/machine",
        "test_fingerprint test_step_key test_step_cache",
        "another_checkpoint",
    ),
    _part("runtime/pages", "test_pages test_scheduler test_packer test_engine"),
    _part(
        "runtime/scheduler",
        "test_scheduler test_failing_requests test_packer test_engine test_logprobs",
        "equal_to_transformers compiled_steps",
    ),
]
_OPTIONS = ["-o", "addopts=", "-x", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
_OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is loaded before pytest starts
# How long a mutant may compute: so many times what its tests take unchanged, and at least so many seconds; and, as one
# may wait for what never comes, how many times that on the clock.
_PATIENCE, _LEAST_PATIENCE_S, _WAITING = 4, 20, 20


@dataclass(frozen=True)
class Mutant:
    """The edit `number` of those of `path`, and once it has run its fate: survived, killed, hung or died."""

    path: str
    number: int
    function: str
    line: int
    before: str
    after: str
    fate: str = ""
    seconds: float = 0.0
    by: str = ""

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """The same for the same edit after lines have moved."""
        return self.path, self.function, self.before, self.after

    def __str__(self) -> str:
        return f"{self.path}:{self.line} in {self.function}\n    - {self.before}\n    + {self.after}"


def mutants_of(path: str) -> list[Mutant]:
    """Every mutant of a file."""
    mutants = []
    for number, edit in enumerate(edits(ast.parse((ROOT / path).read_text()))):
        mutants.append(Mutant(path, number, edit.function, edit.statement.lineno, *edit.described()))
    return mutants


def sample(parts: Sequence[Part], count: int, seed: int) -> list[Mutant]:
    """`count` mutants: as evenly as can be over `parts`, and within a part over its functions.

    The tables at the top of a file count as one function.
    """
    queues = []
    for part in parts:
        draw = random.Random(f"{seed} {part.paths}")  # whichever other parts are asked for
        places: dict[tuple[str, str], list[Mutant]] = defaultdict(list)
        for mutant in (mutant for path in part.paths for mutant in mutants_of(path)):
            places[mutant.path, "" if mutant.function.lstrip("_").isupper() else mutant.function].append(mutant)
        shuffled = [draw.sample(each, len(each)) for each in places.values()]
        queues.append(_in_turn(draw.sample(shuffled, len(shuffled))))
    return _in_turn(queues)[:count]


def _in_turn(queues: Sequence[list]) -> list:
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


class _Mutated(importlib.machinery.SourceFileLoader):
    """Finds and loads one module, from a tree instead of its file."""

    def __init__(self, path: str, tree: ast.Module) -> None:
        super().__init__(path.removesuffix(".py").replace("/", "."), str(ROOT / path))
        self._tree = tree

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self._tree, self.path, "exec")


class _FirstFailure:
    """A plugin of pytest that remembers which test failed first."""

    name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.name = self.name or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.name = self.name or f"import of {report.nodeid}"


class Ran(NamedTuple):
    """What became of a mutant, by which test, and how many seconds it has computed."""

    fate: str
    by: str
    seconds: float


def run(path: str, tree: ast.Module, edit: Edit | None, tests: Sequence[str], limit_s: int) -> Ran:
    """Run `tests`, arguments of pytest, with `edit` in the `tree` of the file `path`; None is the file as it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 5))
            _run_tests(folder, path, tree, edit, tests)
        code, seconds = _wait(child, limit_s * _WAITING)
        if code in (None, -signal.SIGXCPU):
            return Ran("hung", "", seconds)
        if code < 0:
            return Ran("died", f"signal {-code}", seconds)
        by = (folder / "failed").read_text()
        if code not in (0, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
            raise RuntimeError(f"pytest could not run {tests}: {code}\n{(folder / 'log').read_text()[-2000:]}")
        return Ran("killed" if code else "survived", by, seconds)


def _wait(child: int, timeout_s: float) -> tuple[int | None, float]:
    """The exit code of `child`, negative for a signal, None where it had to be ended; and its seconds of computing."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    _, _, usage = os.wait4(child, 0)
    return None, usage.ru_utime + usage.ru_stime


def _run_tests(folder: Path, path: str, tree: ast.Module, edit: Edit | None, tests: Sequence[str]) -> None:
    """In the fork, and never back."""
    os.setpgid(0, 0)
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ["AUTODEPLOY_CACHE"] = str(folder)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # nobody reads the shrunk example
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    first = _FirstFailure()
    code = int(pytest.ExitCode.INTERNAL_ERROR)
    try:
        with edit.applied() if edit else nullcontext():
            sys.meta_path.insert(0, _Mutated(path, tree))
            code = int(pytest.main([*_OPTIONS, *tests], plugins=[first]))
    except BaseException:
        traceback.print_exc()
    finally:
        (folder / "failed").write_text(first.name)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def survey(part: Part, chosen: Sequence[Mutant], is_slow: bool) -> Iterator[Mutant]:
    """The fate of each of `chosen`, mutants of `part`."""
    files = [name for name in part.slow if name.startswith("test_")]
    without = " and ".join(f"not {word}" for word in part.slow if word not in files)
    tests = [f"tests/{name}.py" for name in (*part.tests, *(files if is_slow else ()))]
    tests += [] if is_slow else ["-k", without]
    trees = {path: ast.parse((ROOT / path).read_text()) for path in part.paths}
    found = {path: edits(tree) for path, tree in trees.items()}
    unchanged = run(part.paths[0], trees[part.paths[0]], None, tests, limit_s=3600)
    if unchanged.fate != "survived":
        raise RuntimeError(f"{unchanged.by} fails with nothing changed")
    print(f"{' '.join(tests)}: {unchanged.seconds:.0f} s", flush=True)
    limit_s = max(_LEAST_PATIENCE_S, math.ceil(_PATIENCE * unchanged.seconds))
    for mutant in chosen:
        ran = run(mutant.path, trees[mutant.path], found[mutant.path][mutant.number], tests, limit_s)
        yield replace(mutant, **ran._asdict())


def _report(done: Sequence[Mutant]) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant in done:
        counts[mutant.path][mutant.fate] += 1
    for path, fates in counts.items():
        print(f"{path:36} {fates.total() - fates['survived']:4} of {fates.total():4} noticed, {dict(fates)}")
    survivors = [mutant for mutant in done if mutant.fate == "survived"]
    print(f"{len(done) - len(survivors)} of {len(done)} noticed; the survivors:")
    for mutant in survivors:
        print(mutant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", help="words in the paths of the files", default=[""])
    parser.add_argument("--slow", action="store_true", help="run the slow tests, too")
    parser.add_argument("--log", type=Path, default=Path("mutants.jsonl"), help="where each fate is written")
    parser.add_argument("--resume", action="store_true", help="believe the log where it says that one was noticed")
    options = parser.parse_args()
    os.chdir(ROOT)
    parts = [part for part in PARTS if any(word in path for word in options.modules for path in part.paths)]
    chosen = sample(parts, options.count, options.seed)
    known = _noticed(options.log) if options.resume else {}
    done = [known[mutant.identity] for mutant in chosen if mutant.identity in known]
    for name in PRELOADED:
        importlib.import_module(name)
    with options.log.open("a" if options.resume else "w") as log:
        for part in parts:
            left = [mutant for mutant in chosen if mutant.path in part.paths and mutant.identity not in known]
            for mutant in survey(part, left, options.slow) if left else ():
                done.append(mutant)
                print(f"{mutant.fate:8} {mutant.seconds:6.1f} s  {mutant}", flush=True)
                log.write(json.dumps(asdict(mutant)) + "\n")
                log.flush()
    _report(done)


def _noticed(log: Path) -> dict[tuple[str, ...], Mutant]:
    logged = [Mutant(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    return {mutant.identity: mutant for mutant in logged if mutant.fate != "survived"}


if __name__ == "__main__":
    main()
