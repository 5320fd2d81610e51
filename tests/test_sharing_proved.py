"""`share_metadata` against eager, on programs that its authors did not write; `prove_sharing.py` runs many more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from sharing_modules import module_db
from sharing_portions import run
from sharing_sweep import op_db
from sharing_trials import Outcome, try_compiled, try_module, try_operator, try_program

NUM_PROGRAMS, NUM_PORTIONS, NUM_COMPILED = 1500, 4, 8
# A third of all operators: each takes some 60 ms.
OPERATORS, MODULES = range(0, len(op_db()), 3), range(0, len(module_db()), 3)

pytestmark = pytest.mark.filterwarnings("ignore")


def check(trial: Callable[[int], Outcome], numbers: range) -> Outcome:
    outcome = run(trial, numbers)
    assert not outcome.differences, "\n\n".join(outcome.differences[:3])
    return outcome


@pytest.mark.parametrize("portion", range(NUM_PORTIONS))
def test_generated_programs(portion: int) -> None:
    """Most programs must run, and many must be changed, or nothing is proved."""
    outcome = check(partial(try_program, 0), range(NUM_PROGRAMS)[portion::NUM_PORTIONS])
    assert outcome.counts["changed and the same"] > 0.3 * outcome.counts["programs"]


@pytest.mark.parametrize("portion", range(NUM_PORTIONS))
def test_operators(portion: int) -> None:
    outcome = check(partial(try_operator, 0), OPERATORS[portion::NUM_PORTIONS])
    assert outcome.counts["changed and the same"] > 0.2 * outcome.counts["programs"]


def test_modules() -> None:
    assert check(partial(try_module, 0), MODULES).counts["programs"] > 50


def test_compiled_programs() -> None:
    assert check(partial(try_compiled, 0), range(NUM_COMPILED)).counts["changed and the same"] > NUM_COMPILED // 2
