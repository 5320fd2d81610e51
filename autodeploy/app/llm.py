"""`LLM`: text in, text out, through the compiled step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from autodeploy import options
from autodeploy.app.models import check_tokenizer, find_model, print_progress
from autodeploy.compiler.apply import Result, apply, resolve_passes
from autodeploy.compiler.own_passes import own_passes
from autodeploy.compiler.report import Report
from autodeploy.errors import OptionError, UnsupportedFeature
from autodeploy.graph.edit import Pass
from autodeploy.inductor.lower import Lowered, lower
from autodeploy.inductor.step_cache import load_or_make
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.ops.cache import Cache
from autodeploy.ops.step_kind import DECODE
from autodeploy.options import flag, integer
from autodeploy.runtime.caches import default_num_pages, free_memory
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.outputs import EngineStats
from autodeploy.runtime.prompts import Prompt, check_words, split_prompts
from autodeploy.runtime.requests import Request, RequestOutput, SamplingParams
from autodeploy.runtime.stream import Stream, TextStream
from autodeploy.trace import num_positions, trace
from autodeploy.viz.table import table

_DEFAULT_MODEL_LEN = 8192
# Of the memory that is free once the model is loaded, for caches; the rest of a GPU's is for a step's activations.
_CPU_MEMORY_SHARE, _GPU_MEMORY_SHARE = 0.3, 0.8
# A GPU needs thousands of tokens to be busy; on a CPU a long step only makes those who decode wait.
_CPU_NUM_TOKENS, _GPU_NUM_TOKENS = 512, 8192
_A_TOKEN_EACH = "a step needs a token for each of max_num_seqs"


@dataclass
class Timings:
    """Seconds from the start of `LLM(...)`; `is_warm` tells that the compiled step came from the cache."""

    load: float = 0.0
    trace: float = 0.0
    passes: float = 0.0
    lower: float = 0.0
    first_token: float = 0.0
    is_warm: bool = False

    def __str__(self) -> str:
        parts = [
            f"{f.name} {getattr(self, f.name):.2f}" for f in fields(self) if f.name not in ("first_token", "is_warm")
        ]
        state = "warm" if self.is_warm else "cold"
        return f"time to first token {self.first_token:.2f} s, {state} ({', '.join(parts)} s)"


class LLM:
    """A language model behind a paged cache and one prepare_metadata node.

    `model` is "demo", a folder, a hub id, or a loaded transformers model. Prompts are strings (put through the
    tokenizer's chat template unless `chat=False`) or token ids (taken as they are) in a list, an array or a tensor.
    `num_pages` is the size of each KV group's page pool, by default what fits into a share of the free memory.
    `max_num_tokens` is the budget of one step, by default 512, and 8192 on a GPU. `max_model_len` is the most tokens of
    a prompt with its answer. With `compile=False` the graph runs as FX made it. On a GPU decode steps run as CUDA
    graphs, unless `cuda_graphs=False`. Everything that can be refused is refused here or when a request is made, before
    anything runs.

    Threads may share one LLM: their requests run in the same steps. A request that fails (its logits are no numbers,
    its step or its tokenizer raises) ends alone: `generate` returns it with finish_reason "error" and its `error`, a
    stream raises it once its other answers are complete.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: Any = None,
        *,
        backend: str | Mapping[str, str] = "auto",
        compile: bool = True,
        dtype: torch.dtype | None = None,
        page_size: int | None = None,
        max_num_seqs: int = 64,
        max_num_tokens: int | None = None,
        max_model_len: int | None = None,
        num_pages: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self._start = time.perf_counter()
        self._timings = Timings()
        flag("compile", compile)
        flag("cuda_graphs", cuda_graphs)
        max_num_seqs = integer("max_num_seqs", max_num_seqs, least=1, end=2**31)
        max_num_tokens = _or_none("max_num_tokens", max_num_tokens, least=max_num_seqs, where=_A_TOKEN_EACH)
        num_pages = _or_none("num_pages", num_pages, least=2)
        max_model_len = _or_none("max_model_len", max_model_len, least=2)
        steps = resolve_passes(None, backend, _or_none("page_size", page_size, least=1))
        check_tokenizer(tokenizer)
        model, own_tokenizer = find_model(model, dtype)
        self.model, self.tokenizer = model, own_tokenizer if tokenizer is None else tokenizer
        self._one_encodes = Lock()
        self.timings.load = self._elapsed()
        self.max_model_len = _model_len(model, max_model_len)
        if max_num_tokens is None:
            max_num_tokens = max(max_num_seqs, _GPU_NUM_TOKENS if model.device.type == "cuda" else _CPU_NUM_TOKENS)
        plan = self._compile(steps) if compile else self._interpret(steps)
        self.report = plan.report
        self._engine = Engine(
            plan.step,
            plan.cache_specs,
            plan.layout_spec,
            device=model.device,
            num_pages=self._num_pages(plan, num_pages, max_num_seqs, max_num_tokens),
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            eos_token_ids=_eos_token_ids(model, self.tokenizer),
            tokenizer=self.tokenizer,
            cuda_graphs=cuda_graphs,
            vocab_size=_num_embeddings(model),
            decode_step=plan.decode_step,
        )

    @property
    def timings(self) -> Timings:
        """Seconds from the start of `LLM(...)`."""
        if engine := getattr(self, "_engine", None):
            self._timings.first_token = max(0.0, engine.first_token_at - self._start)
        return self._timings

    @property
    def stats(self) -> EngineStats:
        """Counts since this LLM was made: steps, tokens, preemptions, host-to-device copies and bytes."""
        return self._engine.stats

    def summary(self) -> str:
        """The report of the passes, what a step sends to the device, and the times so far."""
        stats, steps = self.stats, max(1, self.stats.num_steps)
        rows = [
            ("per step", f"{stats.num_steps} steps"),
            ("host-to-device copies", f"{stats.num_host_to_device_copies / steps:.2f}"),
            ("host-to-device bytes", f"{stats.host_to_device_bytes / steps:.0f}"),
            ("host work", f"{stats.host_seconds / steps * 1e6:.0f} us"),
        ]
        return "\n".join([str(self.report), *table(rows, right=True), str(self.timings)])

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, chat: bool = True
    ) -> list[RequestOutput]:
        """Answer all prompts as one ragged batch; the outputs are in the order of the prompts.

        Raises RequestTooLong or OptionError before anything runs.
        """
        return self._engine.run(self._requests(split_prompts(prompts), params, chat))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, chat: bool = True) -> TextStream:
        """The answer to one prompt, piece by piece as it is made. Closing the iterator cancels the request."""
        return TextStream(Stream(self._engine, self._requests([prompt], params, chat)))

    def stream_many(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, chat: bool = True
    ) -> Stream:
        """(index of the prompt, piece of its answer), as they are made.

        Prompts are checked here, and run from when the first piece is asked for.
        """
        return Stream(self._engine, self._requests(split_prompts(prompts), params, chat))

    def _requests(self, prompts: Sequence[Any], params: SamplingParams | None, chat: bool) -> list[Request]:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise OptionError(f"params is a {type(params).__name__}", fix="give ad.SamplingParams(...)")
        flag("chat", chat)
        return self._engine.make_requests([self._encode(prompt, chat) for prompt in prompts], [params] * len(prompts))

    def _encode(self, prompt: Any, chat: bool) -> Any:
        if not isinstance(prompt, str):
            return prompt
        check_words(prompt)
        if not callable(self.tokenizer):
            raise OptionError("a prompt in words for a model without a tokenizer", fix="give token ids, or a tokenizer")
        try:
            # Asked by two threads at once, it may raise.
            with self._one_encodes:
                return self._token_ids(prompt, chat)
        except Exception as error:  # a tokenizer and a chat template may raise anything
            raise OptionError(f"the tokenizer raised {type(error).__name__}: {error}", where="a prompt") from error

    def _token_ids(self, prompt: str, chat: bool) -> Any:
        assert self.tokenizer is not None
        if chat and getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}]
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return self.tokenizer(prompt).input_ids

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedFeature(
            "an LLM can be neither copied nor pickled", fix="make another from the same model: its step is kept on disk"
        )

    def _compile(self, steps: list[Pass]) -> _Plan:
        folder = options.from_environment().cache_dir / "steps"
        every = [*steps, *self._specialize()]
        lowered, self.timings.is_warm = load_or_make(
            folder, self.model, every, self._trace, lambda gm: self._lower(gm, steps), print_progress
        )
        decode_step = lowered.bind(self.model, DECODE) if DECODE in lowered.artifacts else None
        step = lowered.bind(self.model)
        return _Plan(step, decode_step, lowered.layout_spec, lowered.cache_specs, lowered.report)

    def _lower(self, gm: fx.GraphModule, steps: list[Pass]) -> Lowered:
        result = self._apply(gm, steps)
        assert result.layout_spec is not None
        print_progress(f"compiling the step ({len(result.module.graph.nodes)} nodes), once for this model")
        start = self._elapsed()
        specs = (result.layout_spec, result.cache_specs, result.report)
        lowered = lower(result.module, self.model, *specs, decode=self._for_decode(result))
        self.timings.lower = self._elapsed() - start
        return lowered

    def _interpret(self, steps: list[Pass]) -> _Plan:
        result = self._apply(self._trace(), steps)
        assert result.layout_spec is not None
        decode_step = self._for_decode(result)
        return _Plan(result.module, decode_step, result.layout_spec, result.cache_specs, result.report)

    def _specialize(self) -> list[Pass]:
        """What makes the graph of decode steps of the other: on a GPU alone, where kernels have something to gain."""
        return [own_passes().SpecializeStep(DECODE)] if self.model.device.type == "cuda" else []

    def _for_decode(self, result: Result) -> fx.GraphModule | None:
        steps = self._specialize()
        return apply(result.module, passes=steps).module if steps else None

    def _trace(self) -> fx.GraphModule:
        start = self._elapsed()
        gm = trace(self.model)
        self.timings.trace = self._elapsed() - start
        return gm

    def _apply(self, gm: fx.GraphModule, steps: list[Pass]) -> Result:
        start = self._elapsed()
        result = apply(gm, passes=steps)
        self.timings.passes = self._elapsed() - start
        return result

    def _num_pages(self, plan: _Plan, wanted: int | None, max_num_seqs: int, max_num_tokens: int) -> tuple[int, ...]:
        if wanted is not None:
            return (wanted,) * plan.layout_spec.num_groups
        return default_num_pages(
            plan.cache_specs,
            plan.layout_spec,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            memory_bytes=_memory_for_caches(self.model.device),
        )

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start


class _Plan(NamedTuple):
    """A runnable step and what it needs; `decode_step` is None where `step` does as well."""

    step: Callable[..., Tensor]
    decode_step: Callable[..., Tensor] | None
    layout_spec: LayoutSpec
    cache_specs: tuple[Cache, ...]
    report: Report


def _memory_for_caches(device: torch.device) -> int:
    """Bytes."""
    return int(free_memory(device) * (_GPU_MEMORY_SHARE if device.type == "cuda" else _CPU_MEMORY_SHARE))


def _or_none(name: str, value: int | None, *, least: int, where: str = "") -> int | None:
    return None if value is None else integer(name, value, least=least, end=2**31, where=where, also="None or ")


def _num_embeddings(model: PreTrainedModel) -> int:
    """Rows of the embedding, of which there may be more than the tokenizer has tokens."""
    embeddings = model.get_input_embeddings()
    # One table per codebook, and one codebook.
    if isinstance(embeddings, torch.nn.ModuleList) and len(embeddings) == 1:
        embeddings = embeddings[0]
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedFeature("a model that embeds a token otherwise than by one table", where=type(model).__name__)
    return weight.shape[0]


def _model_len(model: PreTrainedModel, wanted: int | None) -> int:
    """The most tokens of a request."""
    most = num_positions(model)
    if wanted is None:
        return min(most or _DEFAULT_MODEL_LEN, _DEFAULT_MODEL_LEN)
    if most and wanted > most:
        raise OptionError(f"max_model_len is {wanted}, the model has {most} positions", fix=f"give at most {most}")
    return wanted


def _eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: those of the generation config, else of the model's, and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids if isinstance(ids, list) else [ids] if ids is not None else [])
    return found
