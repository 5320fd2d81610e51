"""`apply(verify=True)`: run the graph before and after each pass on random ragged batches and compare every bit.

A pass that says that it may round is allowed what its dtype makes of that.

A graph is run at whatever stage it is in: padded inputs one sequence at a time, packed inputs all at once, and with
caches in two steps, so that the second step reads what the first one wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from autodeploy.compiler.pipeline import PassRecord
from autodeploy.errors import PassError
from autodeploy.graph.edit import Pass, get_attribute, placeholder, placeholders
from autodeploy.graph.meta import CACHE_SPECS, LAYOUT_SPEC
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.metadata.nest import nest_sequences
from autodeploy.ops.cache import PoolSizes
from autodeploy.ops.kinds import kind_of

# How far apart a pass that may round can leave the logits of a token, as a share of their root mean square:
# SUMMING for float32 sums in another order, of thousands of terms; and where results are kept in fewer bits, the error
# of a layer times the square root of their number, as roundings add up like a random walk. Some ten values are rounded
# on the way through a layer, each by eps / sqrt(12) on average, in both graphs: 1.3 eps. Twice that is allowed;
# measured are 1.44 eps at most in bfloat16 (11 model types of four layers).
SUMMING, LAYER_ROUNDING = 1e-4, 2.5
_LARGEST = 6.0  # the largest of a hundred thousand errors over their root mean square
_BATCHES = (((5, 3), (1, 1)), ((17, 1), (2, 4), (1, 1)), ((9, 9),))  # sequences of (first chunk, second chunk)
_NUM_PAGES, _NUM_STATES = 256, 16
# Where a graph chooses, experts mostly, rounding may turn a choice, and all that follows from it. Seldom, so that a
# wrong pass is told by most of several draws of the tokens.
_CHOICES = ("topk", "sort", "argsort", "argmax")
_DRAWS = 5


@dataclass
class Verifier:
    """Observer that compares each pass's graph with the one before. Raises PassError naming the pass."""

    seed: int = 0
    _before: list[Tensor] = field(default_factory=list)
    _num_layers: int = 1

    def before(self, step: Pass, gm: fx.GraphModule) -> None:
        if not self._before:
            self._before = self._run(gm)

    def after(self, step: Pass, gm: fx.GraphModule, record: PassRecord) -> None:
        if not record.matches:
            return
        now = self._run(gm)
        # Cached nodes are no longer of a kind; the canonical ones were counted before.
        self._num_layers = max(self._num_layers, sum(kind_of(node.target) is not None for node in gm.graph.nodes))
        exact = not getattr(step, "may_round", False)
        for batch in range(len(_BATCHES)):
            draws = zip(self._before[batch :: len(_BATCHES)], now[batch :: len(_BATCHES)], strict=False)
            told = [difference(old, new, exact=exact, num_layers=self._num_layers) for old, new in draws]
            problems = [problem for problem in told if problem]
            if problems and (exact or 2 * len(problems) > len(told)):
                raise PassError(
                    f"pass {step.name!r} changed the logits of random batch {batch}: {problems[0]}",
                    where=repr(step),
                    fix="run the passes before it alone and compare the graphs",
                )
        self._before = now

    def _run(self, gm: fx.GraphModule) -> list[Tensor]:
        """The logits of each batch, for each draw of its tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        num_draws = _DRAWS if any(_chooses(node) for node in gm.graph.nodes) else 1
        with torch.no_grad():
            return [run_batch(gm, batch, generator) for _ in range(num_draws) for batch in _BATCHES]


def _chooses(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.split("::")[-1] in _CHOICES


def difference(old: Tensor, new: Tensor, *, exact: bool, num_layers: int = 1) -> str | None:
    """None where the logits [R, V] agree, else how far they are apart."""
    if torch.equal(old, new):
        return None
    apart, values = (new.double() - old.double()).abs(), old.double()
    scale_R1 = values.square().mean(-1, keepdim=True).sqrt()
    allowed = SUMMING + LAYER_ROUNDING * torch.finfo(old.dtype).eps * num_layers**0.5
    is_near = (apart.square().mean(-1, keepdim=True).sqrt() <= allowed * scale_R1).all()
    if not exact and bool(is_near & (apart <= _LARGEST * allowed * scale_R1).all()):
        return None
    return f"off by {apart.max().item():.3g} where the largest is {values.abs().max().item():.3g}"


def run_batch(gm: fx.GraphModule, batch: Sequence[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """Logits of the last token of each sequence [R, V], for sequences of random tokens in two chunks each."""
    vocabulary = _embedding(gm).shape[0]
    tokens = [torch.randint(0, vocabulary, (sum(chunks),), generator=generator) for chunks in batch]
    if placeholder(gm, "layout") is None:
        return torch.cat([_run_padded(gm, sequence) for sequence in tokens])
    if not placeholders(gm, "cache"):
        spec = LayoutSpec(page_size=1, spans=())
        return _last_rows(_run_packed(gm, [s.numpy() for s in tokens], [0] * len(tokens), spec, ()), tokens)
    return _run_cached(gm, batch, tokens)


def _embedding(gm: fx.GraphModule) -> Tensor:
    """The embedding that the token ids index; it lies where the graph runs."""
    node = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)[0]
    return get_attribute(gm, str(node.args[0].target))


def _run_padded(gm: fx.GraphModule, sequence: Tensor) -> Tensor:
    device = _embedding(gm).device
    positions = torch.arange(sequence.numel(), device=device)[None]
    tensors = {"input_ids": sequence[None].to(device), "position_ids": positions}
    # Not by a call, which would ask an exported module's inputs in another form than its graph has.
    inputs = [tensors.get(node.name) for node in placeholders(gm)]
    logits = fx.Interpreter(gm).run(*inputs, enable_io_processing=False)
    return (logits[0] if isinstance(logits, tuple | list) else logits)[:, -1]


def _run_packed(
    gm: fx.GraphModule, tokens: list[np.ndarray], context_lens: list[int], spec: LayoutSpec, caches: Sequence[Tensor]
) -> Tensor:
    """One step over sequences whose pages follow each other; padded by one row and two tokens."""
    rows = len(tokens)
    pages = 1 + max(len(t) + c for t, c in zip(tokens, context_lens, strict=True)) // spec.page_size
    table = 1 + np.arange(rows * pages, dtype=np.int32).reshape(rows, pages)
    nested = nest_sequences(
        np.concatenate(tokens),
        [len(t) for t in tokens],
        context_lens,
        np.broadcast_to(table, (spec.num_groups, rows, pages)),
        1 + np.arange(rows, dtype=np.int32),
        spec,
        num_pages=[_NUM_PAGES] * spec.num_groups,
        num_state_slots=_NUM_STATES,
        pad_sequences=rows + 1,
        pad_tokens=sum(len(t) for t in tokens) + 2,
    ).to(_embedding(gm).device)
    return gm(nested.input_ids, nested.layout, *caches)


def _run_cached(gm: fx.GraphModule, batch: Sequence[tuple[int, int]], tokens: list[Tensor]) -> Tensor:
    spec: LayoutSpec = LAYOUT_SPEC.of(gm)
    device = _embedding(gm).device
    sizes = PoolSizes((_NUM_PAGES,) * spec.num_groups, spec.page_size, _NUM_STATES)
    caches = [torch.zeros(cache.whole(sizes), dtype=cache.dtype, device=device) for cache in CACHE_SPECS.of(gm)]
    first = [sequence[: chunks[0]].numpy() for sequence, chunks in zip(tokens, batch, strict=True)]
    rest = [sequence[chunks[0] :].numpy() for sequence, chunks in zip(tokens, batch, strict=True)]
    _run_packed(gm, first, [0] * len(batch), spec, caches)
    logits = _run_packed(gm, rest, [chunks[0] for chunks in batch], spec, caches)
    return _last_rows(logits, [torch.as_tensor(chunk) for chunk in rest])


def _last_rows(logits: Tensor, tokens: Sequence[Tensor]) -> Tensor:
    """The rows of each sequence's last token, from logits [1, T, V], or [R, V] once they are gathered."""
    if logits.dim() == 2:
        return logits[: len(tokens)]
    ends = torch.tensor([len(sequence) for sequence in tokens]).cumsum(0) - 1
    return logits[0, ends]
