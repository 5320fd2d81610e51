"""The engine on a GPU: captured decode steps, caches full of NaN, copies that overlap work, and torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from poison import by_token, poison_each_step
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import autodeploy as ad
from autodeploy.runtime.staging import Link, Staging

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Inductor loads modules of torch's that warn about torch's own.
    pytest.mark.filterwarnings("default"),
]

PAGE_SIZE = 16
PROMPTS = [[5] * 3, [6, 7], list(range(20, 90)), [9], list(range(3, 40))]
TIE = 1e-2  # between two logits: matrix products in tf32 may choose either
GREEDY = ad.SamplingParams(max_tokens=40, ignore_eos=True)


@cache
def llama() -> PreTrainedModel:
    """Two layers, 4 heads of 64 over 2 key-value heads, 128 tokens, float32 so that ties are rare."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval().cuda()


@pytest.fixture(autouse=True)
def exact_matmul() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make_llm(**options: object) -> ad.LLM:
    sizes = {"page_size": PAGE_SIZE, "max_num_seqs": 6, "max_num_tokens": 64, "num_pages": 60}
    return ad.LLM(llama(), **(sizes | options))  # type: ignore[arg-type]


def answers(llm: ad.LLM) -> list[tuple[int, ...]]:
    return [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]


def check_greedy(answered: list[tuple[int, ...]]) -> None:
    """Every token is transformers' best given those before it, or as good as that."""
    for prompt, answer in zip(PROMPTS, answered, strict=True):
        assert len(answer) == GREEDY.max_tokens
        ids = torch.tensor([[*prompt, *answer[:-1]]], device="cuda")
        with torch.no_grad():
            logits_TV = llama()(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        chosen_T1 = logits_TV.gather(1, torch.tensor(answer, device="cuda")[:, None])
        assert (logits_TV.amax(-1, keepdim=True) - chosen_T1).max() <= TIE


@pytest.mark.parametrize("compile", [False, True], ids=["graph", "inductor"])
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["direct", "captured"])
def test_answers_are_those_of_transformers(compile: bool, cuda_graphs: bool) -> None:
    check_greedy(answers(make_llm(compile=compile, cuda_graphs=cuda_graphs)))


def test_each_bucket_is_captured_once() -> None:
    """The first two of the five requests end a step before the others."""
    llm = make_llm()
    first = answers(llm)
    captured = llm._engine._captured
    assert captured is not None
    replays = dict(captured._replays)
    assert sorted(sizes.num_sequences for sizes in replays) == [4, 6]
    assert answers(llm) == first
    assert captured._replays == replays


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["direct", "captured"])
def test_what_nobody_owns_is_neither_read_nor_written(cuda_graphs: bool) -> None:
    llm = make_llm(cuda_graphs=cuda_graphs)
    first = answers(llm)
    specs = ad.apply(ad.trace(llama()), page_size=PAGE_SIZE).cache_specs
    poison_each_step(llm._engine, specs, by_token)
    assert answers(llm) == first


def test_a_replay_waits_for_nothing() -> None:
    llm = make_llm()
    answers(llm)
    engine = llm._engine
    captured = engine._captured
    assert captured is not None
    sizes = next(iter(captured._replays))
    num_columns = engine._spec.num_columns(sizes.pages_per_sequence)
    step = engine._staging.arenas[-1].view(sizes.num_tokens, sizes.num_sequences, num_columns)
    step.buffer.zero_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured(sizes, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_arena_is_not_written_while_its_copy_waits_behind_work() -> None:
    link = Link(torch.device("cuda"))
    staging = Staging(link, 1 << 20, 2, 4)
    seen = torch.zeros(6, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    for number in range(6):
        torch.cuda._sleep(20_000_000)  # cycles: some 10 ms, so that the host is ahead
        nested = staging.arenas[staging.next_arena()].view(1 << 20, 2, 4)
        nested.buffer.fill_(number)
        seen[number].copy_(staging.send(nested).layout[0, 0])
    assert seen.tolist() == list(range(6))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_equals_eager(mode: str) -> None:
    model = copy.deepcopy(llama())
    compiled = torch.compile(model, backend="autodeploy", mode=mode)
    skips = counters["inductor"]["cudagraph_skips"]
    for length in (16, 16, 16, 24, 24, 24):
        ids = torch.arange(3, 3 + length, device="cuda")[None]
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(input_ids=ids, use_cache=False).logits.clone()
            torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == skips, "Inductor ran without CUDA graphs"
    torch._dynamo.reset()
