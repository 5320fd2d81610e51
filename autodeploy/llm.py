"""`LLM`: text in, text out, through the compiled step."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from autodeploy import options
from autodeploy.backend import Result, apply, resolve_passes
from autodeploy.errors import OptionError
from autodeploy.lowering import Lowered, lower
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.models import load_model, print_progress, resolve_model
from autodeploy.ops.spec import CacheSpec
from autodeploy.pipeline import Pass
from autodeploy.report import Report, align
from autodeploy.runtime.caches import default_num_pages
from autodeploy.runtime.engine import Engine, EngineStats
from autodeploy.runtime.requests import Request, RequestOutput, SamplingParams, Status
from autodeploy.step_cache import load_or_make, step_key
from autodeploy.trace import trace

_DEFAULT_MODEL_LEN = 8192
# Of the memory that is free once the model is loaded, for caches; the rest of a GPU's is for a step's activations.
_CPU_MEMORY_SHARE, _GPU_MEMORY_SHARE = 0.3, 0.8
# A GPU needs thousands of tokens to be busy; on a CPU a long step only makes those who decode wait.
_CPU_NUM_TOKENS, _GPU_NUM_TOKENS = 512, 8192

Prompt = str | Sequence[int]


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
    tokenizer's chat template unless `chat=False`) or lists of token ids (taken as they are).
    `num_pages` is the size of each KV group's page pool, by default what fits into a share of the free memory.
    `max_num_tokens` is the budget of one step, by default 512, and 8192 on a GPU. With `compile=False` the graph runs
    as FX made it. On a GPU decode steps run as CUDA graphs, unless `cuda_graphs=False`. Everything that can be refused
    is refused here or when a request is made, before anything runs.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
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
        self.timings = Timings()
        steps = resolve_passes(None, backend, page_size)
        if isinstance(model, str):
            model, own_tokenizer = load_model(resolve_model(model), dtype)
            tokenizer = tokenizer or own_tokenizer
        self.model, self.tokenizer = model, tokenizer
        self.timings.load = self._elapsed()
        config = model.config.get_text_config()
        model_len = getattr(config, "max_position_embeddings", None) or _DEFAULT_MODEL_LEN
        self.max_model_len = min(max_model_len or min(model_len, _DEFAULT_MODEL_LEN), model_len)
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
            eos_token_ids=_eos_token_ids(model, tokenizer),
            tokenizer=tokenizer,
            cuda_graphs=cuda_graphs,
        )

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
        return "\n".join([str(self.report), *align(rows), str(self.timings)])

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, chat: bool = True
    ) -> list[RequestOutput]:
        """Answer all prompts as one ragged batch; the outputs are in the order of the prompts.

        Raises RequestTooLong or OptionError before anything runs.
        """
        requests = self._add(prompts, params, chat)
        with closing(self._steps(requests)) as steps:
            for _ in steps:
                pass
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, chat: bool = True) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is made. Closing the iterator cancels the request."""
        for _, piece in self.stream_many([prompt], params, chat=chat):
            yield piece

    def stream_many(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, *, chat: bool = True
    ) -> Iterator[tuple[int, str]]:
        """(index of the prompt, piece of its answer), as they are made."""
        return self._pieces(self._add(prompts, params, chat))

    def _pieces(self, requests: list[Request]) -> Iterator[tuple[int, str]]:
        with closing(self._steps(requests)) as steps:
            for _ in steps:
                for index, request in enumerate(requests):
                    if piece := request.take_text():
                        yield index, piece

    def _steps(self, requests: list[Request]) -> Generator[None]:
        """Steps until all `requests` have ended, maybe in somebody else's steps; cancels them when closed before."""
        try:
            done = False
            while not done:
                self._engine.step()
                self.timings.first_token = self.timings.first_token or self._elapsed()
                done = all(request.status is Status.FINISHED for request in requests)
                yield
        finally:
            for request in requests:
                self._engine.cancel(request)

    def _add(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None, chat: bool) -> list[Request]:
        many = [prompts] if _is_one(prompts) else list(prompts)
        params = params or SamplingParams()
        return self._engine.add_many([self._encode(prompt, chat) for prompt in many], [params] * len(many))

    def _encode(self, prompt: Any, chat: bool) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise OptionError("a prompt in words for a model without a tokenizer", fix="give token ids, or a tokenizer")
        if chat and self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return self.tokenizer(prompt).input_ids

    def _compile(self, steps: list[Pass]) -> _Plan:
        folder = options.from_environment().cache_dir / "steps" / step_key(self.model, steps)
        lowered, self.timings.is_warm = load_or_make(folder, lambda: self._lower(steps), print_progress)
        return _Plan(lowered.bind(self.model), lowered.layout_spec, lowered.cache_specs, lowered.report)

    def _lower(self, steps: list[Pass]) -> Lowered:
        result = self._apply(steps)
        assert result.layout_spec is not None
        print_progress(f"compiling the step ({len(result.module.graph.nodes)} nodes), once for this model")
        start = self._elapsed()
        lowered = lower(result.module, self.model, result.layout_spec, result.cache_specs, result.report)
        self.timings.lower = self._elapsed() - start
        return lowered

    def _interpret(self, steps: list[Pass]) -> _Plan:
        result = self._apply(steps)
        assert result.layout_spec is not None
        return _Plan(result.module, result.layout_spec, result.cache_specs, result.report)

    def _apply(self, steps: list[Pass]) -> Result:
        start = self._elapsed()
        gm = trace(self.model)
        self.timings.trace = self._elapsed() - start
        result = apply(gm, passes=steps)
        self.timings.passes = self._elapsed() - start - self.timings.trace
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
    """A runnable step and what it needs."""

    step: Callable[..., Tensor]
    layout_spec: LayoutSpec
    cache_specs: tuple[CacheSpec, ...]
    report: Report


def _memory_for_caches(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_MEMORY_SHARE)
    return int(psutil.virtual_memory().available * _CPU_MEMORY_SHARE)


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt: a string, or a list of token ids rather than of prompts."""
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(item, int) for item in prompts))


def _eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: those of the generation config, else of the model's, and the tokenizer's."""
    found: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids if isinstance(ids, list) else [ids] if ids is not None else [])
    return found
