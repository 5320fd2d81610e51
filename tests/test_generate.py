"""The demo model end to end: its greedy answers are transformers', however the batch is cut and whoever is preempted.

A token may differ from transformers' only in a tie (see greedy.py). Answers have 64 tokens, past the end of sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from greedy import TIE, check_greedy
from torch._dynamo.utils import counters
from transformers import GenerationConfig

import autodeploy as ad
from autodeploy.app.models import load_model, resolve_model
from autodeploy.errors import DownloadError

# Inductor loads a module of torch's that warns about torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

Check = Callable[[list[ad.RequestOutput]], None]

GREEDY = ad.SamplingParams(max_tokens=64, ignore_eos=True)
CHUNK = 128  # tokens of a step: fewer than the longer prompts have
SMALL_POOL = 48  # pages of 16 tokens; the prompts with their answers take 140, the longest 23

QUESTIONS = (
    "Hello, who are you?",
    "What is the capital of France?",
    "Write a haiku about autumn leaves falling into a quiet pond.",
    "Explain in two sentences why the sky is blue and why sunsets are red.",
    "Give me a recipe for pancakes with flour, eggs, milk, butter and a pinch of salt.",
    "List three things to see in Lisbon, and say in a few words what each of them is known for.",
)
TEXTS = ("The cat sat", "Once upon a time, there was a lighthouse", "2 + 2 =", "In a shocking finding, scientists")
STORY = """The harbour was still dark when Marta pushed the boat away from the quay. Her father had taught her to read
the water before she could read a book, and on mornings like this one she could almost hear his voice: watch the colour,
not the waves. The nets lay folded in the stern, mended twice over the winter, and the small engine coughed before it
settled into its rhythm. Beyond the breakwater the wind came from the west, cold and steady, and with it the smell of
rain. She had promised to be back by noon. There was a meeting in the town hall about the new ferry, and everybody would
be there: the fishermen, who feared for their moorings, the hotel owners, who had already printed the brochures, and the
old schoolteacher, who was against everything on principle and was usually right. Marta had not decided what to say.
A ferry would bring doctors and letters and people who bought fish at city prices. It would also bring noise, and
diesel, and summer visitors who left their rubbish on the beach. She thought of her brother, who had left four years ago
and wrote only at Christmas. Would he have stayed? The first net came up heavy. She laughed out loud, alone on the grey
water, because it was full of"""


@pytest.fixture(scope="module")
def llm() -> ad.LLM:
    try:
        resolve_model("demo")
    except DownloadError as error:
        pytest.skip(f"the demo model cannot be had: {error.what}")
    return ad.LLM("demo", max_num_tokens=CHUNK)


@pytest.fixture(scope="module")
def prompts(llm: ad.LLM) -> list[list[int]]:
    """Sixteen, from 3 tokens to about 300: chats, sentences, and beginnings of a story."""
    words = STORY.split()
    raw = [*TEXTS, *(" ".join(words[:count]) for count in (30, 60, 90, 130, 170, len(words)))]
    chats = [
        llm.tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in QUESTIONS
    ]
    return [*chats, *(llm.tokenizer(text).input_ids for text in raw)]


@pytest.fixture(scope="module")
def check(prompts: list[list[int]]) -> Check:
    """Checks outputs, in the order of the prompts, with transformers' eager attention."""
    model, _ = load_model(resolve_model("demo"))
    model.set_attn_implementation("eager")

    @cache  # most runs give the same answers
    def check_once(prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
        check_greedy(model, prompt, answer)

    def check(outputs: list[ad.RequestOutput]) -> None:
        for prompt, output in zip(prompts, outputs, strict=True):
            assert len(output.token_ids) == GREEDY.max_tokens
            check_once(tuple(prompt), output.token_ids)

    return check


@pytest.fixture(scope="module")
def together(llm: ad.LLM, prompts: list[list[int]]) -> list[ad.RequestOutput]:
    """All prompts in one ragged batch, the longer ones in chunks."""
    return llm.generate(prompts, GREEDY)


def test_prompts_are_of_mixed_length(prompts: list[list[int]]) -> None:
    lengths = sorted(map(len, prompts))
    assert len(lengths) == 16
    assert lengths[0] == 3
    assert lengths[-1] > 2 * CHUNK


def test_together(together: list[ad.RequestOutput], check: Check) -> None:
    check(together)


def test_one_at_a_time(llm: ad.LLM, prompts: list[list[int]], check: Check) -> None:
    check([llm.generate(prompt, GREEDY)[0] for prompt in prompts])


def test_preempted(prompts: list[list[int]], check: Check) -> None:
    tight = ad.LLM("demo", max_num_tokens=CHUNK, num_pages=SMALL_POOL)
    assert tight.timings.is_warm
    check(tight.generate(prompts, GREEDY))
    assert tight.stats.num_preemptions > 0


def test_transformers_generate(prompts: list[list[int]], together: list[ad.RequestOutput]) -> None:
    """Three of the answers against `generate` itself, token by token, as far as the first tie."""
    model, _ = load_model(resolve_model("demo"))
    model.set_attn_implementation("eager")
    # Instead of the model's own, which ends at the end of sequence.
    model.generation_config = GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=2)
    for index in (0, 6, 12):  # a chat, a few words, a part of the story
        input_ids = torch.tensor([prompts[index]])
        # With a mask: left to itself, generate leaves out the padding token, which is the template's end of message.
        made = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert len(made.logits) == GREEDY.max_tokens
        for logits_1V, token in zip(made.logits, together[index].token_ids, strict=True):
            best, second = logits_1V[0].topk(2).values.tolist()
            if best - second <= TIE:
                break
            assert logits_1V[0].argmax() == token


def test_no_size_compiles_anything_again(llm: ad.LLM, together: list[ad.RequestOutput]) -> None:
    short = ad.SamplingParams(max_tokens=3, ignore_eos=True)
    before = copy.deepcopy(counters)
    for count, length in ((1, 1), (1, 2), (2, 1), (5, 33), (33, 7), (64, 2), (1, 1000)):
        llm.generate([[10 + length] * length for _ in range(count)], short)
    assert counters == before
    torch.compile(torch.nn.Identity(), backend="eager")(torch.ones(2))
    assert counters != before  # they do count


def test_stream_gives_the_text(llm: ad.LLM) -> None:
    params = ad.SamplingParams(max_tokens=24)
    pieces = list(llm.stream(QUESTIONS[0], params))
    assert len(pieces) > 1
    assert "".join(pieces) == llm.generate(QUESTIONS[0], params)[0].text


def test_closed_stream_cancels(llm: ad.LLM) -> None:
    before = llm.stats.num_steps
    stream = llm.stream(QUESTIONS[1], GREEDY)
    next(stream)
    stream.close()
    llm.generate([5], ad.SamplingParams(max_tokens=1))
    assert llm.stats.num_steps - before < GREEDY.max_tokens // 2


def test_stop_string_ends_the_text(llm: ad.LLM) -> None:
    text = llm.generate(QUESTIONS[0], GREEDY)[0].text
    stop = text[20:26]
    stopped = llm.generate(QUESTIONS[0], ad.SamplingParams(max_tokens=64, ignore_eos=True, stop=stop))[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 64
