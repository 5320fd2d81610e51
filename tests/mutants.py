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
import os
import random
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

import hypothesis
import pytest
from mutations import Edit, edits

ROOT = Path(__file__).parents[1]
PRELOADED = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "transformers", "hypothesis.strategies", "numpy")
# The tests that know a module best, the fastest first.
_SHARING = ["test_memory", "test_fuzz_completeness", "test_passes_share_metadata", "test_fuzz_share_metadata"]
TESTS = {
    "autodeploy/equality.py": ["test_equality", *_SHARING, "test_dynamo_integers"],
    "autodeploy/effects.py": ["test_effects", *_SHARING],
    "autodeploy/aliasing.py": ["test_effects", "test_equality", *_SHARING],
    "autodeploy/dependence.py": ["test_effects", *_SHARING, "test_mixing"],
    "autodeploy/outline.py": _SHARING,
    "autodeploy/mixing.py": ["test_mixing", "test_passes_nest_inputs"],
    "autodeploy/runtime/pages.py": ["test_pages", "test_scheduler", "test_packer", "test_engine"],
    "autodeploy/runtime/scheduler.py": ["test_scheduler", "test_packer", "test_engine"],
}
_OPTIONS = ["-o", "addopts=", "-x", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
_OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is loaded before pytest starts
# How long a mutant may run: so many times what its module's tests take unchanged, and at least so many seconds.
_PATIENCE, _LEAST_PATIENCE_S = 4, 30


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


def sample(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` of `mutants`: as evenly as can be over files, and within a file over functions."""
    files: dict[str, dict[str, list[Mutant]]] = defaultdict(lambda: defaultdict(list))
    for mutant in mutants:
        files[mutant.path][mutant.function].append(mutant)
    queues = []
    for path, functions in files.items():
        draw = random.Random(f"{seed} {path}")  # a file's mutants do not depend on which other files are asked for
        shuffled = [draw.sample(each, len(each)) for each in functions.values()]
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


def run(path: str, tree: ast.Module, edit: Edit | None, tests: Sequence[str], timeout_s: float) -> tuple[str, str]:
    """(fate, the test that saw it) of `edit` of the `tree` of the file `path`; no edit is the file as it is."""
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            _run_tests(Path(folder), path, tree, edit, tests)
        code = _wait(child, timeout_s)
        name = Path(folder) / "failed"
        by = name.read_text() if name.exists() else ""
        log = Path(folder) / "log"
        if code == 0:
            return "survived", ""
        if code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
            return "killed", by
        if code is None:
            return "hung", ""
        if code < 0:
            return "died", f"signal {-code}"
        raise RuntimeError(f"pytest could not run {tests}: {code}\n{log.read_text()[-2000:]}")


def _wait(child: int, timeout_s: float) -> int | None:
    """The exit code of `child`, negative for a signal, None where it had to be ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_tests(folder: Path, path: str, tree: ast.Module, edit: Edit | None, tests: Sequence[str]) -> None:
    """In the fork, and never back."""
    os.setpgid(0, 0)
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
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
        (folder / "failed").write_text(first.name)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def survey(chosen: Sequence[Mutant]) -> Iterator[Mutant]:
    """The fate of each of `chosen`, file by file."""
    by_path: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in chosen:
        by_path[mutant.path].append(mutant)
    seconds: dict[str, float] = {}
    for path, mutants in by_path.items():
        tree = ast.parse((ROOT / path).read_text())
        found = edits(tree)
        tests = [f"tests/{name}.py" for name in TESTS[path]]
        for test in tests:
            seconds[test] = seconds.get(test) or _seconds_unchanged(test)
        patience = max(_LEAST_PATIENCE_S, _PATIENCE * sum(seconds[test] for test in tests))
        for mutant in mutants:
            started = time.monotonic()
            fate, by = run(path, tree, found[mutant.number], tests, patience)
            yield replace(mutant, fate=fate, by=by, seconds=round(time.monotonic() - started, 1))


def _seconds_unchanged(test: str) -> float:
    """How long a file of tests takes where nothing is wrong; raises RuntimeError where it fails."""
    started = time.monotonic()
    path = next(iter(TESTS))
    fate, by = run(path, ast.parse((ROOT / path).read_text()), None, [test], timeout_s=3600)
    if fate != "survived":
        raise RuntimeError(f"{test} fails with nothing changed: {by}")
    print(f"{test}: {time.monotonic() - started:.0f} s", flush=True)
    return time.monotonic() - started


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
    parser.add_argument("--log", type=Path, default=Path("mutants.jsonl"), help="where each fate is written")
    parser.add_argument("--resume", action="store_true", help="believe the log where it says that one was noticed")
    options = parser.parse_args()
    os.chdir(ROOT)
    paths = [path for path in TESTS if any(word in path for word in options.modules)]
    chosen = sample([mutant for path in paths for mutant in mutants_of(path)], options.count, options.seed)
    known = {}
    if options.resume and options.log.exists():
        logged = [Mutant(**json.loads(line)) for line in options.log.read_text().splitlines()]
        known = {mutant.identity: mutant for mutant in logged if mutant.fate != "survived"}
    for name in PRELOADED:
        importlib.import_module(name)
    done = [known[mutant.identity] for mutant in chosen if mutant.identity in known]
    with options.log.open("a" if options.resume else "w") as log:
        for mutant in survey([mutant for mutant in chosen if mutant.identity not in known]):
            done.append(mutant)
            print(f"{mutant.fate:8} {mutant.seconds:6.1f} s  {mutant}", flush=True)
            log.write(json.dumps(asdict(mutant)) + "\n")
            log.flush()
    _report(done)


if __name__ == "__main__":
    main()
