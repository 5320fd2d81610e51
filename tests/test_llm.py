"""`LLM` and the engine on tiny models of every type: greedy answers equal transformers', whatever the batch."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import check_greedy
from hash_model import LetterTokenizer
from tiny_models import MODEL_TYPES, VOCAB_SIZE, WINDOW, tiny
from torch._dynamo.utils import counters
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

import autodeploy as ad
from autodeploy.app.tiny import tiny_model
from autodeploy.errors import AutodeployError, OptionError, RequestTooLong, UnknownName, UnsupportedFeature
from autodeploy.graph.edit import Pass
from autodeploy.metadata.span import Full, Window
from autodeploy.runtime.engine import Engine
from passes import default

# Inductor loads a module of torch's that warns about torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

ROOT = Path(__file__).parents[1]
PAGE_SIZE = 4
SIZES: dict[str, Any] = {"page_size": PAGE_SIZE, "max_num_seqs": 8, "max_num_tokens": 16}  # so prompts come in chunks
GREEDY = ad.SamplingParams(max_tokens=20, ignore_eos=True)
SAMPLED = ad.SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, top_k=40, top_p=0.9, seed=7)
# The longest takes 27 pages with its answer, all together 72.
LONGEST_PAGES, SMALL_POOL = 27, 32


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 5, 19, 40, 90, 3)]


PROMPTS = make_prompts()


def check(model_type: str, outputs: list[ad.RequestOutput]) -> None:
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.finish_reason == "length"
        check_greedy(tiny(model_type), prompt, output.token_ids)


def test_scores_multiplied_by_their_mask() -> None:
    model = tiny_model("openai-gpt")
    for prompt, output in zip(PROMPTS, ad.LLM(model, compile=False, **SIZES).generate(PROMPTS, GREEDY), strict=True):
        check_greedy(model, prompt, output.token_ids)


def test_one_codebook_is_one_table() -> None:
    config = MusicgenDecoderConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, num_codebooks=1
    )
    model = MusicgenForCausalLM(config).eval()
    for prompt, output in zip(PROMPTS, ad.LLM(model, compile=False, **SIZES).generate(PROMPTS, GREEDY), strict=True):
        check_greedy(model, prompt, output.token_ids)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, so that compiling is really done."""
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ragged_batch_equals_transformers(model_type: str) -> None:
    llm = ad.LLM(tiny(model_type), compile=False, **SIZES)
    check(model_type, llm.generate(PROMPTS, GREEDY))
    assert llm.stats.num_preemptions == 0


@pytest.mark.parametrize("model_type", ["gemma3_text", "lfm2", "llama4_text"])
def test_preempted_equals_transformers(model_type: str) -> None:
    llm = ad.LLM(tiny(model_type), compile=False, num_pages=SMALL_POOL, **SIZES)
    check(model_type, llm.generate(PROMPTS, GREEDY))
    assert llm.stats.num_preemptions > 0


@pytest.mark.parametrize("model_type", ["gemma3_text", "lfm2", "gemma4_text"])
def test_compiled_equals_transformers(model_type: str, cache_dir: Path) -> None:
    """Once compiled, no batch compiles anything again, whatever its size."""
    llm = ad.LLM(tiny(model_type), **SIZES)
    assert not llm.timings.is_warm
    before = copy.deepcopy(counters)
    check(model_type, llm.generate(PROMPTS, GREEDY))
    for prompt in PROMPTS:
        check_greedy(tiny(model_type), prompt, llm.generate(prompt, GREEDY)[0].token_ids)
    assert counters == before


def run_engine(model_type: str, passes: list[Pass], num_pages: tuple[int, ...] | None = None) -> list[Any]:
    """The outputs of `PROMPTS` through the graph that `passes` make, as it is."""
    result = ad.apply(ad.trace(tiny(model_type)), passes=passes)
    assert result.layout_spec is not None
    engine = Engine(
        result.module,
        result.cache_specs,
        result.layout_spec,
        device=torch.device("cpu"),
        num_pages=num_pages or (100,) * result.layout_spec.num_groups,
        max_model_len=128,
        max_num_seqs=SIZES["max_num_seqs"],
        max_num_tokens=SIZES["max_num_tokens"],
    )
    requests = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    return [request.output() for request in requests]


@pytest.mark.parametrize("last", ["insert_cached_attention", "share_metadata"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "lfm2"])
def test_every_stage_with_caches_runs(model_type: str, last: str) -> None:
    """With metadata naively in front of every layer, and once it is shared but still in fields."""
    steps = default(page_size=PAGE_SIZE)
    names = [step.name for step in steps]
    check(model_type, run_engine(model_type, steps[: names.index(last) + 1]))


def test_pages_behind_the_window_are_used_again() -> None:
    """The pool of the sliding layers holds not even one of the longer prompts."""
    sliding_pages = 10
    assert sliding_pages * PAGE_SIZE < max(map(len, PROMPTS))
    steps = default(page_size=PAGE_SIZE)
    spec = ad.apply(ad.trace(tiny("gemma3_text")), passes=steps).layout_spec
    assert spec is not None
    assert set(spec.spans) == {Full(), Window(WINDOW)}
    num_pages = tuple(100 if span == Full() else sliding_pages for span in spec.spans)
    check("gemma3_text", run_engine("gemma3_text", steps, num_pages))


@pytest.fixture(scope="module")
def llama() -> ad.LLM:
    return ad.LLM(tiny("llama"), compile=False, max_model_len=128, num_pages=SMALL_POOL, **SIZES)


def test_seed_repeats_in_any_batch(llama: ad.LLM) -> None:
    together = [output.token_ids for output in llama.generate(PROMPTS, SAMPLED)]
    assert together == [llama.generate(prompt, SAMPLED)[0].token_ids for prompt in PROMPTS]
    greedy = [output.token_ids for output in llama.generate(PROMPTS, GREEDY)]
    assert together != greedy


def test_top_k_of_one_is_greedy(llama: ad.LLM) -> None:
    only_best = ad.SamplingParams(max_tokens=20, ignore_eos=True, temperature=2.0, top_k=1)
    assert [o.token_ids for o in llama.generate(PROMPTS, only_best)] == [
        o.token_ids for o in llama.generate(PROMPTS, GREEDY)
    ]


def test_end_of_sequence_ends(llama: ad.LLM) -> None:
    free = llama.generate(PROMPTS[1], GREEDY)[0].token_ids
    model = copy.deepcopy(tiny("llama"))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = free[4]
    llm = ad.LLM(model, compile=False, **SIZES)
    output = llm.generate(PROMPTS[1], ad.SamplingParams(max_tokens=20))[0]
    assert (output.token_ids, output.finish_reason) == (free[: free.index(free[4]) + 1], "stop")


def test_streams_may_be_read_by_turns() -> None:
    """Each also steps the requests of the other, and the shorter answer ends in a step of the longer one."""
    llm = ad.LLM(tiny("llama"), LetterTokenizer(), compile=False, **SIZES)
    lengths = [ad.SamplingParams(max_tokens=count, ignore_eos=True) for count in (20, 5)]
    alone = [llm.generate(prompt, params)[0].text for prompt, params in zip(PROMPTS, lengths, strict=False)]
    streams = [llm.stream(prompt, params) for prompt, params in zip(PROMPTS, lengths, strict=False)]  # type: ignore[arg-type]
    pieces = list(zip_longest(*streams, fillvalue=""))
    assert ["".join(text) for text in zip(*pieces, strict=True)] == alone


@pytest.mark.parametrize(
    ("prompts", "params", "error"),
    [
        ([[5], [5] * 120], GREEDY, RequestTooLong),  # for max_model_len
        ([[5], "words"], GREEDY, OptionError),
        ([[5], []], GREEDY, OptionError),
        ([[5], [0.5]], GREEDY, OptionError),
        ([[5], [5, -1]], GREEDY, OptionError),
        ([[5]], ad.SamplingParams(stop="x"), OptionError),
    ],
)
def test_refused_request_changes_nothing(
    llama: ad.LLM, prompts: list[Any], params: ad.SamplingParams, error: type[AutodeployError]
) -> None:
    before = copy.copy(llama.stats)
    with pytest.raises(error):
        llama.generate(prompts, params)
    answer = llama.generate([5], ad.SamplingParams(max_tokens=1))
    assert len(answer) == 1
    assert llama.stats.num_tokens == before.num_tokens + 1


def test_request_longer_than_the_pool_is_refused() -> None:
    llm = ad.LLM(tiny("llama"), compile=False, num_pages=LONGEST_PAGES, **SIZES)
    with pytest.raises(RequestTooLong, match="page pool"):
        llm.generate(PROMPTS[4], GREEDY)


def test_half_precision_on_the_cpu_is_refused() -> None:
    model = copy.deepcopy(tiny("llama")).half()
    with pytest.raises(UnsupportedFeature, match="float16") as caught:
        ad.LLM(model)
    assert "layers.0" in caught.value.where


def test_unknown_backend_is_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(UnknownName, match="sdpa"):
        ad.LLM("./no such folder", backend="spda")
    with pytest.raises(OptionError, match="page_size"):
        ad.LLM("./no such folder", page_size=0)


_ANSWER = """
import dataclasses, json, sys
import autodeploy as ad
llm = ad.LLM(sys.argv[1])
tokens = llm.generate([[5, 6, 7], [8] * 30], ad.SamplingParams(max_tokens=4, ignore_eos=True))
print(json.dumps(dataclasses.asdict(llm.timings) | {"tokens": [output.token_ids for output in tokens]}))
"""


def _answer(folder: Path, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _ANSWER, str(folder)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
def test_second_process_neither_traces_nor_compiles(tmp_path: Path, cache_dir: Path) -> None:
    """Not even where Inductor's own cache, a temporary folder, is gone: the compiler looks at headers at most."""
    tiny("llama").save_pretrained(tmp_path / "model")
    compiler, log = tmp_path / "c++", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    cold = _answer(tmp_path / "model", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "first"), CXX=str(compiler))
    assert not cold["is_warm"]
    assert cold["trace"] > 0
    assert cold["lower"] > 0
    assert ".cpp" in log.read_text()
    log.write_text("")
    warm = _answer(tmp_path / "model", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "second"), CXX=str(compiler))
    assert warm["is_warm"]
    assert warm["trace"] == warm["passes"] == warm["lower"] == 0
    assert warm["tokens"] == cold["tokens"]
    assert not [line for line in log.read_text().splitlines() if ".cpp" in line]
