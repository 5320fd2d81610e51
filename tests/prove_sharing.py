"""Proves `share_metadata` by trial, against eager, on programs that its authors did not write. Run by hand.

    python tests/prove_sharing.py --programs 100000     generated programs, through every front end
    python tests/prove_sharing.py --operators 20        all of op_db and all modules, 20 programs a spelling
    python tests/prove_sharing.py --compiled 500        generated programs through torch.compile, run by FX
    python tests/prove_sharing.py --inductor 20         packs of them through backend="autodeploy" and Inductor

A trial is known by its seed and its number: `--first` goes on where a run was ended. Trials run in portions, each in a
process of its own, because torch ends the process on some odd arguments; such a trial is counted and passed over.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sharing_modules import module_db
from sharing_portions import run
from sharing_sweep import op_db
from sharing_trials import Outcome, try_compiled, try_inductor, try_module, try_operator, try_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=0)
    parser.add_argument("--operators", type=int, default=0, metavar="EACH")
    parser.add_argument("--compiled", type=int, default=0)
    parser.add_argument("--inductor", type=int, default=0, metavar="PACKS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", type=int, default=20, help="so many differences are printed")
    options = parser.parse_args()
    total = Outcome()
    if options.operators:
        trial = functools.partial(try_operator, options.seed, each=options.operators)
        total.add(_all(trial, range(options.first, len(op_db())), 20, options))
        trial = functools.partial(try_module, options.seed, each=options.operators)
        total.add(_all(trial, range(len(module_db())), 20, options))
    if options.programs:
        trial = functools.partial(try_program, options.seed)
        total.add(_all(trial, range(options.first, options.first + options.programs), 1000, options))
    if options.compiled:
        trial = functools.partial(try_compiled, options.seed)
        total.add(_all(trial, range(options.first, options.first + options.compiled), 50, options))
    if options.inductor:
        trial = functools.partial(try_inductor, options.seed)
        total.add(_all(trial, range(options.first, options.first + options.inductor), 1, options))
    for name, number in total.counts.most_common():
        print(f"{number:>9,} {name}")
    print(f"{len(total.ended):>9,} ended the process {total.ended or ''}")
    print(f"{len(total.differences):>9,} differences")
    sys.exit(bool(total.differences))


def _all(trial: Callable[[int], Outcome], numbers: range, portion: int, options: argparse.Namespace) -> Outcome:
    total, start = Outcome(), time.monotonic()
    portions = [numbers[at : at + portion] for at in range(0, len(numbers), portion)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for portion_numbers, outcome in zip(portions, pool.map(functools.partial(run, trial), portions), strict=True):
            for difference in outcome.differences[: max(0, options.show - len(total.differences))]:
                print(f"--- {difference}\n", flush=True)
            total.add(outcome)
            done = f"trials up to {portion_numbers.stop:,} of {numbers.stop:,}"
            print(f"{done}, {time.monotonic() - start:.0f} s, {len(total.differences)} differences", flush=True)
    return total


if __name__ == "__main__":
    main()
