"""Numbered trials of `share_metadata`, each the same at every run: what they try, and how each ended."""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from unittest.mock import patch

import sharing_modules
import torch
from sharing_check import Different, Invalid, Tracer, check, failure, minimal, state_of
from sharing_compiled import WAYS, check_compiled, packed
from sharing_complete import shortcomings
from sharing_facts import lies, lies_in
from sharing_fronts import FRONTS
from sharing_generate import generate
from sharing_program import Program, Step, spell
from sharing_sweep import calls, op_db, programs

from autodeploy.graph import memory

# How many of a thousand programs go through each front end: they differ a hundredfold in price.
SHARES = {
    "fx": 620,
    "fx with values": 100,
    "two pieces": 120,
    "symbolic_trace": 100,
    "make_fx": 50,
    "make_fx symbolic": 6,
    "export": 4,
}


@dataclass
class Outcome:
    """Counts by name, and every difference made small, with its program."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)  # trials that ended the process

    def add(self, other: Outcome) -> None:
        self.counts += other.counts
        self.differences += other.differences
        self.ended += other.ended


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings, and with memory that nobody wrote to always filled alike."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def try_program(seed: int, number: int) -> Outcome:
    """One generated program through one front end, at times with no memory to spare for what is moved to the front."""
    rng = random.Random(f"{seed} {number}")
    (front,) = rng.choices(list(SHARES), list(SHARES.values()))
    program = generate(rng)
    with patch.object(memory, "PEAK_BYTES", rng.choice((0, memory.PEAK_BYTES))):
        outcome = _tried(program, front)
    if number % 4 == 0:
        outcome.add(_facts_of(program))
    if number % 8 == 1:
        outcome.add(_completeness_of(program))
    return outcome


def try_compiled(seed: int, number: int) -> Outcome:
    """One generated program through Dynamo and AOTAutograd, with the pass in the graph, run by FX; odd ones dynamic."""
    way = "torch.compile, dynamic" if number % 2 else "torch.compile"
    return _tried(generate(random.Random(f"{seed} {number}")), way)


def try_inductor(seed: int, number: int, size: int = 8) -> Outcome:
    """Several generated programs in one, compiled by Inductor with our backend and with its own."""
    rng = random.Random(f"{seed} {number}")
    found = (program for program in iter(lambda: generate(rng), None) if not _leaves_memory_unwritten(program))
    return _tried(packed(list(islice(found, size))), "Inductor")


def _leaves_memory_unwritten(program: Program) -> bool:
    """Inductor, other than eager, does not fill it."""
    return any(part in spell(step) for step in program.steps for part in ("empty", "resize", "set_", "out="))


def try_operator(seed: int, number: int, each: int = 1) -> Outcome:
    """Every spelling of one operator of op_db: `each` single calls, and `each` programs that call it twice."""
    op = op_db()[number]
    rng = random.Random(f"{seed} {number}")
    outcome = Outcome(Counter({"operators": 1}))
    for step, values in calls(op, rng, each):
        outcome.add(_facts(step, values))
    for program in programs(op, rng, each):
        outcome.add(_tried(program, rng.choice(("fx", "fx", "fx with values", "make_fx"))))
    return outcome


def try_module(seed: int, number: int, each: int = 1) -> Outcome:
    """One of torch's own modules, in training and in evaluation, for some of its constructor's samples."""
    rng = random.Random(f"{seed} {number}")
    outcome = Outcome(Counter({"modules": 1}))
    with contextlib.suppress(ImportError, NotImplementedError):  # a module that has no samples on a CPU
        for program in sharing_modules.programs(sharing_modules.module_db()[number], rng, each):
            outcome.add(_tried(program, "fx"))
    return outcome


def _facts(step: Step, values: list[object]) -> Outcome:
    try:
        found = lies(step, values)
    except Exception:  # the operator refuses its sample in this spelling
        return Outcome()
    return Outcome(Counter({"calls": 1}), [f"{spell(step)} {lie}, which is denied" for lie in found])


def _facts_of(program: Program) -> Outcome:
    state = state_of(program, program.root())
    try:
        found = lies_in(program)
    except Exception:
        return Outcome()
    finally:
        state.restore()
    return Outcome(Counter({"calls": len(program.steps)}), [f"{lie}, which is denied, in\n{program}" for lie in found])


def _completeness_of(program: Program) -> Outcome:
    try:
        return Outcome(Counter({"looked at for what was left": 1}), shortcomings(program))
    except Exception:  # eager refuses it, or the trial of the program has said so
        return Outcome()


def _tried(program: Program, front: str) -> Outcome:
    counts = Counter({"programs": 1, f"through {front}": 1})
    try:
        matches = check_compiled(program, front) if front in WAYS else check(program, FRONTS[front])
    except Invalid:
        counts["refused by eager or by the tracer"] += 1
    except Tracer:
        counts["different before any pass"] += 1
    except Different as error:
        counts["different"] += 1
        return Outcome(counts, [_report(program, front, error)])
    else:
        counts["changed and the same" if matches else "unchanged"] += 1
    return Outcome(counts)


def _report(program: Program, front: str, error: Different) -> str:
    if front in WAYS:
        return f"through {front}\n{program}\n{error}"
    small = minimal(program, FRONTS[front])
    return f"through {front}\n{small}\n{failure(small, FRONTS[front]) or f'fails at times: {error}'}"
