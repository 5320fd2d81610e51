"""A kind of your own: a linear recurrence h[t] = decay * h[t - 1] + x[t], from a toy hybrid model to ragged batches.

One file holds all of it: the op with its plain meaning, its facts, the door by which it enters a traced model, and the
backend that keeps the state of each sequence. Nothing else of autodeploy has to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import autodeploy as ad
from autodeploy.extend import Backend, Cache, Door, Kind, Site, State, fields, path_of, recorded, register_kind


@torch.library.custom_op("example::recurrence", mutates_args=())
def recurrence(hidden: Tensor, decay: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """hidden [B, S, C], decay [C] -> [B, S, C]; `cu_seqlens` cuts one packed row into sequences."""
    bounds = [0, hidden.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    out = hidden.clone()
    for start, stop in pairwise(bounds):
        for t in range(start + 1, stop):
            out[:, t] += decay * out[:, t - 1]
    return out


@recurrence.register_fake
def _(hidden, decay, cu_seqlens=None):
    return torch.empty_like(hidden)


@torch.library.custom_op("example::cached_recurrence", mutates_args=("state",))
def cached_recurrence(
    hidden: Tensor, decay: Tensor, state: Tensor, state_slots: Tensor, goes_on: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """The same from the state [slots, C] of each sequence, which goes on from there if it has one."""
    out = torch.zeros_like(hidden)
    rows = zip(state_slots.tolist(), goes_on.tolist(), cu_seqlens.diff().tolist(), cu_seqlens.tolist(), strict=False)
    for slot, has_state, length, start in rows:
        last = state[slot] if has_state else torch.zeros_like(decay)
        for t in range(start, start + length):
            out[0, t] = last = decay * last + hidden[0, t]
        if length:
            state[slot] = last
    return out


@cached_recurrence.register_fake
def _(hidden, decay, *_):
    return torch.empty_like(hidden)


@dataclass(frozen=True)
class RecurrenceFacts:
    channels: int


class CachedRecurrence(Backend[RecurrenceFacts]):
    name, kind, meaning = "reference", "recurrence", "one token after another"

    def why_not(self, site: Site[RecurrenceFacts]) -> str | None:
        return None if site.dtype is torch.float32 else "float32 only"

    def caches(self, site: Site[RecurrenceFacts]) -> tuple[Cache, ...]:
        return (State("state", (site.facts.channels,), site.dtype),)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        rows = {"state_slots": fields.state_slots(layout), "goes_on": fields.has_initial_state(layout)}
        return rows | {"cu_seqlens": fields.cu_seqlens_q(layout)}

    def attend(self, tensors: tuple[Any, ...], caches: tuple[Any, ...], metadata: dict[str, Any], site: Site) -> Tensor:
        return torch.ops.example.cached_recurrence.default(*tensors, *caches, **metadata)


class Recurrence(Kind[RecurrenceFacts]):
    name, meaning, layer_types = "recurrence", "linear recurrence with a decay per channel", ("recurrence",)
    op = torch.ops.example.recurrence.default
    tolerances: ClassVar = {torch.float32: (1e-5, 1e-5)}
    token_dims, result_dim = (1, None), 1
    doors = (Door("scan", recurrence),)
    reference = CachedRecurrence()  # type: ignore[assignment]

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        return node.args[:2]

    def describe(self, node: fx.Node) -> Site[RecurrenceFacts]:
        hidden, decay = recorded(node, *node.args[:2])
        facts = RecurrenceFacts(int(decay.shape[0]))
        return Site(self.name, path_of(node), self.name, hidden.dtype, hidden.device, facts)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[RecurrenceFacts]:
        return Site(self.name, "plain layer", self.name, dtype, device, RecurrenceFacts(8))

    def operands(self, site: Site[RecurrenceFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        return torch.randn(1, num_tokens, site.facts.channels), torch.rand(site.facts.channels)

    def run(self, tensors: tuple[Any, ...], site: Site[RecurrenceFacts]) -> Tensor:
        return recurrence(*tensors)


def scan(hidden: Tensor, decay: Tensor) -> Tensor:
    """What the model itself runs; tracing puts the op in its place."""
    steps = [hidden[:, 0]]
    for t in range(1, hidden.shape[1]):
        steps.append(decay * steps[-1] + hidden[:, t])
    return torch.stack(steps, dim=1)


class ToyConfig(PretrainedConfig):
    model_type = "toy"
    vocab_size, hidden_size = 64, 16


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decay = nn.Parameter(torch.linspace(0.1, 0.9, config.hidden_size))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> CausalLMOutput:
        hidden = scan(self.embedding(input_ids), self.decay)
        head = hidden[:, None]
        seen = nn.functional.scaled_dot_product_attention(head, head, head, is_causal=True)
        return CausalLMOutput(logits=self.head(hidden + seen[:, 0]))


def greedy(model: ToyModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def main() -> None:
    register_kind(Recurrence())
    torch.manual_seed(0)
    model = ToyModel(ToyConfig()).eval()
    # Prompts of several lengths in one batch; steps of 4 tokens at most, so that prompts come in chunks; and too few
    # pages for the attention layer, so that a request loses its state and starts again.
    llm = ad.LLM(model, compile=False, max_num_seqs=3, max_num_tokens=4, page_size=4, num_pages=6)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]
    for prompt, output in zip(prompts, llm.generate(prompts, ad.SamplingParams(max_tokens=6)), strict=True):
        assert list(output.token_ids) == greedy(model, prompt, 6)
        print(prompt, "->", list(output.token_ids))
    assert llm.stats.num_preemptions > 0
    print(llm.report)


if __name__ == "__main__":
    main()
