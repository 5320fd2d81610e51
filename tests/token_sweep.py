"""Every operator of torch's own list, with its own samples, over tokens: what `token_flow` accepts keeps them apart.

    python tests/token_sweep.py [EVERY] [OFFSET]

For each sample and each dimension of its first tensor, that dimension is made the sequence: token ids are embedded into
a tensor of that shape, a second tensor of the same shape is made of them likewise, other tensors are constants. The op
is traced with a symbolic length and judged. Where it is accepted, each token is changed in turn and the results of all
others must not change by a bit, at the length that was traced and at another one.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.meta import VALUE
from autodeploy.graph.tokens import Flow, token_flow

_SAMPLES = 6  # of each op; the later ones differ in numbers rather than in kind
_VOCABULARY = 50


class TooShort(Exception):
    """The sequence of this sample is no symbol: another argument has fixed it."""


def cases(every: int = 1, offset: int = 0) -> Iterator[tuple[str, Any, Any, int]]:
    """(name, op, sample, dimension) of every `every`th op."""
    for op in op_db[offset::every]:
        if torch.float32 not in op.dtypes or "empty" in op.name:  # what was never written is anything
            continue
        for variant in (op.get_op(), op.get_inplace()):
            for index, sample in enumerate(op.sample_inputs("cpu", torch.float32)):
                if index >= _SAMPLES or variant is None or not isinstance(sample.input, Tensor):
                    break
                for dim, size in enumerate(sample.input.shape):
                    if size > 1 and sample.input.numel() < 4096:
                        yield f"{op.name}.{op.variant_test_name} {index}", variant, sample, dim


def embedded(ids: Tensor, like: Tensor, dim: int, table: Tensor) -> Tensor:
    """A tensor of the shape of `like` whose entries along `dim` are the tokens of `ids` [1, S]."""
    rest = [size for at, size in enumerate(like.shape) if at != dim]
    return torch.nn.functional.embedding(ids[0], table).view(-1, *rest).movedim(0, dim).contiguous()


def traced(function: Any, sample: Any, dim: int) -> tuple[fx.GraphModule, int]:
    """The graph of ids [1, S] -> results, and the length it was traced at."""
    source, length = sample.input, sample.input.shape[dim]
    if length == 0 or not source.numel():
        raise TooShort
    generator = torch.Generator().manual_seed(0)
    tables: dict[int, Tensor] = {}

    def run(input_ids: Tensor) -> list[Tensor]:
        def one(arg: Any) -> Any:
            if isinstance(arg, Tensor) and arg.shape == source.shape and arg.dtype == source.dtype:
                width = source.numel() // length
                table = tables.setdefault(id(arg), torch.rand(_VOCABULARY, width, generator=generator) + 0.1)
                return embedded(input_ids, source, dim, table)
            return arg

        args, kwargs = pytree.tree_map(one, (sample.args, sample.kwargs))
        found = function(one(source), *args, **kwargs)
        return [result for result in pytree.tree_leaves(found) if isinstance(result, Tensor)]

    ids = torch.arange(length)[None]
    run(ids)  # draws the tables outside of the trace
    gm = make_fx(run, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)(ids)
    return gm, length


def judge(gm: fx.GraphModule) -> Flow | None:
    """None where `token_flow` refuses."""
    (node,) = gm.graph.find_nodes(op="placeholder")
    node.name = "input_ids"
    try:
        flow = token_flow(gm, ())
    except UnsupportedFeature as error:
        raise TooShort from error
    return None if flow.mixing or flow.places else flow


def _tokens_of(result: Tensor, recorded: Any, flow: Flow, length: int) -> list[Tensor] | None:
    """The result's entries by token; None where no dimension, or more than one, holds tokens."""
    dims = [at for at, size in enumerate(recorded.shape) if isinstance(size, torch.SymInt)]
    if len(dims) != 1:
        return None
    return list(result.movedim(dims[0], 0).unflatten(0, (length, -1)))


def leaks(gm: fx.GraphModule, flow: Flow, length: int) -> bool:
    """Whether changing a token changes another one's results."""
    outputs = list(gm.graph.output_node().all_input_nodes)
    ids = torch.arange(length)[None]
    before = gm(ids)
    for token in range(length):
        changed = ids.clone()
        changed[0, token] = _VOCABULARY - 1
        for old, new, node in zip(before, gm(changed), outputs, strict=False):
            parts = _tokens_of(old, VALUE.of(node), flow, length), _tokens_of(new, VALUE.of(node), flow, length)
            one, other = (([whole] if part is None else part) for part, whole in zip(parts, (old, new), strict=True))
            kept = [at for at in range(len(one)) if parts[0] is None or at != token]
            if any(not _same(one[at], other[at]) for at in kept):
                return True
    return False


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def examine(function: Callable[..., Any], sample: Any, dim: int) -> str:
    """ "refused", "apart" where it was accepted rightly, "leaks", or "skipped" where nothing could be asked."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            gm, length = traced(function, sample, dim)
            flow = judge(gm)
        except Exception:  # not every op runs on every shape, and not every one can be traced with symbols
            return "skipped"
        if flow is None:
            return "refused"
        try:
            return "leaks" if leaks(gm, flow, length) or leaks(gm, flow, length + 2) else "apart"
        except (RuntimeError, IndexError, ValueError):
            return "leaks" if leaks(gm, flow, length) else "apart"  # guards on the length


def _shapes(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else leaf, value)


def main() -> None:
    every, offset = (int(arg) for arg in (*sys.argv[1:], "1", "0")[:2])
    counts: Counter[str] = Counter()
    ops: dict[str, set[str]] = {}
    for name, function, sample, dim in cases(every, offset):
        torch.manual_seed(0)
        answer = examine(function, sample, dim)
        counts[answer] += 1
        ops.setdefault(answer, set()).add(name.split()[0])
        if answer == "leaks":
            print(name, f"dimension {dim} of", _shapes(sample.input), _shapes((sample.args, sample.kwargs)), flush=True)
    print(dict(counts), {answer: len(names) for answer, names in ops.items()})


if __name__ == "__main__":
    main()
