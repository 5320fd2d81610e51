"""Everything at once on one engine: threads, small pools, streams left half-way, and requests that fail.

    python tests/soak.py [--requests 10000] [--threads 4] [--seed 0] [--model hash|llama]

Every answer is compared with what the request gets alone. At the end nothing is owned, nothing is queued, no request is
in memory but those of the last steps, and answers are right. Prints the counts, and the resident memory as it went.
"""

from __future__ import annotations

import argparse
import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from typing import Any

import psutil
import torch
from hash_model import INFINITY, MINUS_INFINITY, NAN, RAISES, VOCABULARY, HashModel, LetterTokenizer, make_engine
from tiny_models import VOCAB_SIZE, tiny

import autodeploy as ad
from autodeploy.errors import OptionError, RequestFailed, RequestTooLong
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.requests import Request, SamplingParams
from autodeploy.runtime.stream import Stream

MAX_TOKENS = 8
NUM_PROMPTS = 40
REFUSED: tuple[Any, ...] = (
    [-1],
    [10**9],
    [1.5],
    [],
    None,
    {"input_ids": [1]},
    [[1]],
    "words",
    b"x",
    [True],
    [1] * 10**4,
)


@dataclass
class Load:
    """An engine, prompts with the tokens that each gets alone, and prompts that fail."""

    engine: Engine
    prompts: list[list[int]]
    answers: list[tuple[int, ...]]
    failing: list[list[int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return sum(self.counts.values())


def hash_load() -> Load:
    """Steps that raise in between, too: each hundredth."""
    model = HashModel(page_size=4)
    engine = make_engine(model, num_pages=(12, 9), max_num_seqs=5, max_num_tokens=9, tokenizer=LetterTokenizer())
    step, calls = engine._step, count()

    def sometimes_failing(*inputs: torch.Tensor) -> torch.Tensor:
        # Only one of several, so that no good request ends by it.
        many = int((inputs[1][:, 0] > 0).sum()) > 1
        model.sizes.clear()  # of all steps: no leak of the engine's
        model.fail_at = 1 if next(calls) % 100 == 0 and many else -1
        return step(*inputs)

    engine._step = sometimes_failing
    random = Random(1)
    prompts = [[random.randrange(VOCABULARY) for _ in range(random.randrange(1, 14))] for _ in range(NUM_PROMPTS)]
    failing = [[1, token] for token in (NAN, MINUS_INFINITY, INFINITY, RAISES)]
    return Load(engine, prompts, [model.expected(prompt, MAX_TOKENS) for prompt in prompts], failing)


def llama_load() -> Load:
    """A llama for which the last token is NaN, in prompts and in answers."""
    model = deepcopy(tiny("llama", num_layers=1))
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB_SIZE - 1] = torch.nan
    sizes: dict[str, Any] = {"page_size": 4, "max_num_seqs": 5, "max_num_tokens": 9, "num_pages": 14}
    llm = ad.LLM(model, LetterTokenizer(), compile=False, max_model_len=64, **sizes)
    random = Random(1)
    prompts = [[random.randrange(VOCAB_SIZE - 1) for _ in range(random.randrange(1, 14))] for _ in range(NUM_PROMPTS)]
    params = SamplingParams(MAX_TOKENS, ignore_eos=True)
    outputs = [llm.generate(prompt, params)[0] for prompt in prompts]
    good = [output for output in outputs if output.error is None]
    failing = [list(output.prompt_token_ids) for output in outputs if output.error]
    load = Load(llm._engine, [list(output.prompt_token_ids) for output in good], [o.token_ids for o in good])
    load.failing = [[1, VOCAB_SIZE - 1], *failing]
    return load


def soak(load: Load, num_requests: int, num_threads: int, seed: int) -> None:
    """Run at least `num_requests`; raises AssertionError where anything is not as it should be."""
    lock, others = threading.Lock(), _num_alive()

    def work(thread: int) -> None:
        random = Random(1000 * seed + thread)
        while load.num_requests < num_requests:
            ask = random.choices(list(ASKS), list(ASKS.values()))[0]
            done = ask(load, random)
            with lock:
                load.counts[ask.__name__.strip("_")] += done
                if load.num_requests // (1 + num_requests // 10) >= len(load.memory):
                    load.memory.append(psutil.Process().memory_info().rss)

    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(work, thread) for thread in range(num_threads)]:
            future.result()
    check_empty(load, others)


def check_empty(load: Load, others: int) -> None:
    """`others` is the number of requests that other engines of this process had before."""
    engine = load.engine
    assert not engine.has_work
    assert not engine._tables.tables.any()
    assert all(len(pool.free) == pool.num_pages - 1 for pool in engine._tables.pools)
    assert len(engine._tables.free_rows) == engine._tables.tables.shape[1]
    for index in range(len(load.prompts)):
        _check(load, index, engine.run(_requests(load, [index]))[0].token_ids)
    # Each arena remembers the batch that it holds.
    assert _num_alive() - others <= (len(engine._staging.arenas) + 1) * len(engine._tables.free_rows)


def _num_alive() -> int:
    gc.collect()
    return sum(type(thing) is Request for thing in gc.get_objects())


def _check(load: Load, index: int, tokens: tuple[int, ...]) -> None:
    assert tokens == load.answers[index], load.prompts[index]


def _requests(load: Load, places: Sequence[int], more: Sequence[list[int]] = ()) -> list[Request]:
    prompts = [*(load.prompts[index] for index in places), *more]
    return load.engine.make_requests(prompts, [SamplingParams(MAX_TOKENS, ignore_eos=True)] * len(prompts))


def _places(load: Load, random: Random) -> list[int]:
    return [random.randrange(len(load.prompts)) for _ in range(random.randrange(1, 5))]


def _generated(load: Load, random: Random) -> int:
    places = _places(load, random)
    for index, output in zip(places, load.engine.run(_requests(load, places)), strict=True):
        _check(load, index, output.token_ids)
    return len(places)


def _streamed(load: Load, random: Random) -> int:
    places = _places(load, random)
    requests = _requests(load, places)
    texts = [""] * len(places)
    for index, text in Stream(load.engine, requests):
        texts[index] += text
    for index, request, text in zip(places, requests, texts, strict=True):
        _check(load, index, request.token_ids)
        assert text == LetterTokenizer().decode(list(load.answers[index]), skip_special_tokens=True)
    return len(places)


def _left_half_way(load: Load, random: Random) -> int:
    places = _places(load, random)
    stream = Stream(load.engine, _requests(load, places))
    for _ in range(random.randrange(4)):
        next(stream, None)
    if random.random() < 0.5:
        stream.close()
    return len(places)


def _never_read(load: Load, random: Random) -> int:
    places = _places(load, random)
    Stream(load.engine, _requests(load, places))
    return len(places)


def _cancelled(load: Load, random: Random) -> int:
    """By another thread, at any time."""
    places = _places(load, random)
    requests = _requests(load, places)
    timer = threading.Timer(random.random() * 0.02, partial(load.engine.cancel, *requests))
    timer.start()
    for index, output in zip(places, load.engine.run(requests), strict=True):
        assert output.finish_reason in ("length", "cancelled")
        assert output.token_ids == load.answers[index][: len(output.token_ids)]
    timer.join()
    return len(places)


def _failing(load: Load, random: Random) -> int:
    """One that fails, among others."""
    places = _places(load, random)
    *outputs, failed = load.engine.run(_requests(load, places, [random.choice(load.failing)]))
    assert isinstance(failed.error, RequestFailed)
    for index, output in zip(places, outputs, strict=True):
        _check(load, index, output.token_ids)
    return len(places) + 1


def _refused(load: Load, random: Random) -> int:
    places = _places(load, random)
    try:
        _requests(load, places, [random.choice(REFUSED)])
    except (OptionError, RequestTooLong):
        return len(places) + 1
    raise AssertionError("it was not refused")


ASKS: dict[Callable[[Load, Random], int], int] = {
    _generated: 4,
    _streamed: 4,
    _left_half_way: 3,
    _never_read: 1,
    _cancelled: 2,
    _failing: 2,
    _refused: 2,
}
LOADS = {"hash": hash_load, "llama": llama_load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=LOADS, default="hash")
    args = parser.parse_args()
    logging.getLogger("autodeploy").setLevel(logging.CRITICAL)
    load = LOADS[args.model]()
    soak(load, args.requests, args.threads, args.seed)
    print(", ".join(f"{count} {name}" for name, count in load.counts.items()))
    print(load.engine.stats)
    print("resident, MB:", [round(size / 1e6, 1) for size in load.memory])


if __name__ == "__main__":
    main()
