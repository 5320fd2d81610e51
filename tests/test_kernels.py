"""Every backend of every kind, against the canonical op run on each whole sequence by itself."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from ragged import Batch, Row, make_batch
from spans import FULL, first
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from autodeploy.kernels.registry import backends
from autodeploy.metadata.span import Chunk, Span, Window
from autodeploy.ops.backend import Backend
from autodeploy.ops.cache import Paged, PoolSizes, State
from autodeploy.ops.kinds import attention, kinds
from autodeploy.ops.kinds.attention import AttentionFacts
from autodeploy.ops.kinds.block_indexer import BlockIndexerFacts
from autodeploy.ops.kinds.causal_conv1d import ConvFacts
from autodeploy.ops.kinds.gated_delta_rule import DeltaFacts
from autodeploy.ops.kinds.latent_attention import LatentFacts
from autodeploy.ops.kinds.lightning_indexer import IndexerFacts
from autodeploy.ops.kinds.linear_recurrence import RecurrenceFacts
from autodeploy.ops.kinds.mlstm import MlstmFacts
from autodeploy.ops.kinds.selective_scan import SelectiveScanFacts
from autodeploy.ops.kinds.ssd import SsdFacts
from autodeploy.ops.kinds.wkv import WkvFacts
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind, run_as

NAN = float("nan")
CPU = torch.device("cpu")
BATCHES = {
    "decode": [(1, 9), (1, 3), (1, 30), (1, 16)],
    "prefill": [(7, 0), (1, 0), (16, 0)],
    "chunk": [(5, 8), (11, 3), (2, 17)],
    "mixed": [(1, 12), (6, 0), (1, 5), (1, 6), (9, 10), (0, 7), (1, 20)],
    "as many tokens as rows": [(2, 4), (0, 7), (1, 20)],
}
ATTENTION_SITES = {
    "gqa": {},
    "mha": {"num_kv_heads": 6},
    "mqa_value_dim": {"num_kv_heads": 1, "value_dim": 8},
    "window": {"span": Window(5)},
    "window_page": {"span": Window(8), "num_kv_heads": 3},
    "chunk": {"span": Chunk(6)},
    "chunk_page": {"span": Chunk(8), "num_kv_heads": 1, "softcap": 2.0},
    "softcap": {"softcap": 1.5},
    "sinks": {"has_sinks": True},
    "all": {"span": Window(6), "softcap": 2.0, "has_sinks": True, "value_dim": 24},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16_all": {"dtype": torch.bfloat16, "span": Window(6), "softcap": 2.0, "has_sinks": True},
    "alibi": {"has_alibi": True},
    "alibi_all": {"span": Window(6), "softcap": 2.0, "has_sinks": True, "has_alibi": True, "num_kv_heads": 1},
    "bfloat16_alibi": {"dtype": torch.bfloat16, "span": Window(6), "has_alibi": True},
    "float64": {"dtype": torch.float64},
}
CONV_SITES = {
    "plain": {},
    "bias_silu": {"has_bias": True, "activation": "silu"},
    "two_taps": {"kernel_size": 2},
    "bfloat16": {"dtype": torch.bfloat16, "has_bias": True},
}
# Decays of about a half per token let states, chunk borders and what lies behind them all show.
SSD_SITES = {
    "plain": {},
    "groups": {"num_groups": 2, "chunk_size": 4},
    "bare": {"has_skip": False, "has_dt_bias": False, "dt_softplus": False},
    "limits": {"dt_min": 0.3, "dt_max": 0.7, "chunk_size": 256},
    "bfloat16": {"dtype": torch.bfloat16, "num_groups": 4},
}

DELTA_SITES = {
    "plain": {},
    "shared_keys": {"num_key_heads": 2, "value_dim": 6},
    "channels": {"has_channel_decays": True},
    "unscaled_keys": {"normalize": False, "num_key_heads": 1},
    "bfloat16": {"dtype": torch.bfloat16, "has_channel_decays": True},
}

LATENT_SITES = {
    "plain": {},
    "window": {"span": Window(5)},
    "chunk": {"span": Chunk(6), "value_dim": 24},
    "small": {"latent_dim": 4, "shared_dim": 2, "value_dim": 5},
    "sinks": {"has_sinks": True},
    "sparse": {"num_chosen": 5},
    "sparse_all": {"num_chosen": 3, "span": Window(6), "has_sinks": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64, "num_heads": 1},
}
SELECTIVE_SITES = {
    "all": {},
    "bare": {"has_skip": False, "has_gate": False, "has_dt_bias": False, "dt_softplus": False},
    "bfloat16": {"dtype": torch.bfloat16},
}


def attention_site(dtype: torch.dtype = torch.float32, span: Span = FULL, **facts: Any) -> Site:
    defaults = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "value_dim": 16, "scale": 0.3}
    return Site("attention", "layer", "any", dtype, CPU, AttentionFacts(**defaults | facts), span)


def conv_site(dtype: torch.dtype = torch.float32, **facts: Any) -> Site:
    defaults = {"channels": 10, "kernel_size": 4}
    return Site("causal_conv1d", "layer", "conv", dtype, CPU, ConvFacts(**defaults | facts))


def delta_site(dtype: torch.dtype = torch.float32, **facts: Any) -> Site:
    defaults = {"num_key_heads": 4, "num_heads": 4, "key_dim": 8, "value_dim": 8, "chunk_size": 4}
    return Site("gated_delta_rule", "layer", "linear_attention", dtype, CPU, DeltaFacts(**defaults | facts))


RECURRENT: dict[str, Any] = {
    "linear_recurrence": RecurrenceFacts(10),
    "wkv": WkvFacts(10),
    "mlstm": MlstmFacts(num_heads=3, key_dim=4, value_dim=6, eps=1e-6),
}


def recurrent_site(kind: str, dtype: torch.dtype) -> Site:
    return Site(kind, "layer", "linear_attention", dtype, CPU, RECURRENT[kind])


def latent_site(dtype: torch.dtype = torch.float32, span: Span = FULL, **facts: Any) -> Site:
    defaults = {"num_heads": 3, "own_dim": 8, "shared_dim": 4, "latent_dim": 16, "value_dim": 8, "scale": 0.3}
    return Site("latent_attention", "layer", "any", dtype, CPU, LatentFacts(**defaults | facts), span)


def ssd_site(dtype: torch.dtype = torch.float32, **facts: Any) -> Site:
    defaults = {"num_heads": 4, "head_dim": 6, "num_groups": 1, "state_size": 10, "chunk_size": 8}
    return Site("ssd", "layer", "linear_attention", dtype, CPU, SsdFacts(**defaults | facts))


def selective_site(dtype: torch.dtype = torch.float32, **facts: Any) -> Site:
    facts = {"channels": 7, "state_size": 5} | facts
    return Site("selective_scan", "layer", "linear_attention", dtype, CPU, SelectiveScanFacts(**facts))


def indexer_site(dtype: torch.dtype = torch.float32, **facts: Any) -> Site:
    defaults = {"num_heads": 8, "key_dim": 16, "num_chosen": 6}
    return Site("lightning_indexer", "layer", "any", dtype, CPU, IndexerFacts(**defaults | facts))


KINDS = {kind.name: kind for kind in kinds()}
SITES = {f"attention-{name}": attention_site(**options) for name, options in ATTENTION_SITES.items()}
SITES |= {f"causal_conv1d-{name}": conv_site(**options) for name, options in CONV_SITES.items()}
SITES |= {f"gated_delta_rule-{name}": delta_site(**options) for name, options in DELTA_SITES.items()}
SITES |= {f"{kind}-float32": recurrent_site(kind, torch.float32) for kind in RECURRENT}
SITES |= {f"{kind}-bfloat16": recurrent_site(kind, torch.bfloat16) for kind in RECURRENT}
SITES |= {f"latent_attention-{name}": latent_site(**options) for name, options in LATENT_SITES.items()}
SITES |= {f"selective_scan-{name}": selective_site(**options) for name, options in SELECTIVE_SITES.items()}
SITES |= {f"ssd-{name}": ssd_site(**options) for name, options in SSD_SITES.items()}
SITES |= {f"lightning_indexer-{count}": indexer_site(num_chosen=count, scale=0.5) for count in (1, 6, 40)}

INDEXER = BlockIndexerFacts(num_heads=3, key_dim=8, rotary_dim=4, block_size=3, num_blocks=2)
SITES["block_indexer-small"] = Site("block_indexer", "layer", "indexed_attention", torch.float32, CPU, INDEXER)


CASES = [
    pytest.param(backend, site, id=f"{backend.name}-{name}")
    for backend in backends()
    for name, site in SITES.items()
    if site.kind == backend.kind and backend.why_not(site) is None
]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a kind's node for the whole length of each sequence; those that all share are the first's."""

    per_sequence: list[tuple[Tensor | None, ...]]

    def of(self, site: Site, index: int) -> list[Tensor | None]:
        tensors = zip(self.per_sequence[index], self.per_sequence[0], KINDS[site.kind].token_dims, strict=True)
        return [shared if dim is None else own for own, shared, dim in tensors]


def make_inputs(site: Site, batch: Batch) -> Inputs:
    on_cpu = replace(site, device=CPU)
    return Inputs([KINDS[site.kind].operands(on_cpu, row.seq_len) for row in batch.rows])


def pack(site: Site, batch: Batch, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The step's new tokens of all sequences in one stream, with noise for padding, on the site's device."""
    padding = KINDS[site.kind].operands(replace(site, device=CPU), batch.num_tokens - batch.total)
    packed = []
    for index, dim in enumerate(KINDS[site.kind].token_dims):
        tensor = inputs.per_sequence[0][index]
        if tensor is not None and dim is not None:
            whole = zip((each[index] for each in inputs.per_sequence), batch.rows, strict=True)
            parts = [each.narrow(dim, row.context_len, row.query_len) for each, row in whole]
            tensor = torch.cat([*parts, padding[index]], dim=dim)
        packed.append(None if tensor is None else tensor.to(site.device))
    return tuple(packed)


def tokens_first(site: Site, result: Tensor) -> Tensor:
    return result.movedim(KINDS[site.kind].result_dim, 0)


def make_caches(backend: Backend, site: Site, batch: Batch) -> tuple[Tensor, ...]:
    """Caches in which every slot is NaN."""
    sizes = PoolSizes((batch.num_pages,) * batch.num_groups, batch.page_size, len(batch.rows) + 2)
    specs = [(cache.whole(sizes), cache.dtype) for cache in backend.caches(site)]
    return tuple(torch.full(shape, NAN, dtype=dtype, device=site.device) for shape, dtype in specs)


def step(backend: Backend, site: Site, batch: Batch, inputs: Inputs, caches: tuple[Tensor, ...]) -> Tensor:
    """One call of the backend on the batch: its result with tokens first, [T, ...]."""
    metadata = backend.metadata(batch.layout().to(site.device), batch.num_tokens, site)
    return tokens_first(site, run_step(backend, pack(site, batch, inputs), caches, metadata, site))


def tolerance(backend: Backend, site: Site) -> tuple[float, float]:
    """That of the coarser of two dtypes: what the layer computes in, and what it caches in."""
    tolerances = KINDS[site.kind].tolerances
    return max(tolerances[site.dtype], tolerances[backend.caches(site)[0].dtype])


def run_step(backend: Backend, *args: Any) -> Any:
    """One call of the backend: `append_and_attend`; what `append` and then `attend` do is the same."""
    tensors, caches, metadata, site = args
    same = tuple(cache.clone() if isinstance(cache, Tensor) else cache for cache in caches)
    out = backend.append_and_attend(*args)
    if any(isinstance(cache, Tensor) for cache in caches):
        backend.append(tensors, same, metadata, site)
        again = backend.attend(tensors, same, metadata, site)
        atol, rtol = tolerance(backend, site)
        torch.testing.assert_close(again, out, atol=atol, rtol=rtol, equal_nan=True)
    return out


def context_batch(batch: Batch) -> Batch:
    """The step that fills the caches with everything before `batch`."""
    rows = tuple(replace(row, query_len=row.context_len, context_len=0) for row in batch.rows)
    return replace(batch, rows=rows, num_tokens=max(1, sum(row.query_len for row in rows)))


def step_kinds(batch: Batch) -> tuple[StepKind, ...]:
    """The kinds of step that may run `batch`."""
    is_decode = batch.num_tokens == len(batch.rows) and all(row.query_len == 1 for row in batch.rows[: batch.total])
    return (MIXED, DECODE) if is_decode else (MIXED,)


def drop_unread_pages(batch: Batch, span: Span) -> Batch:
    """Free the pages that no new token sees, as the engine does: their table entries become the scratch page."""

    def drop(row: Row) -> Row:
        dropped = first(span, row.context_len) // batch.page_size
        return replace(row, tables=tuple((0,) * dropped + table[dropped:] for table in row.tables))

    return replace(batch, rows=tuple(drop(row) for row in batch.rows))


def is_paged(backend: Backend, site: Site) -> bool:
    return isinstance(backend.caches(site)[0], Paged)


def poison_unowned(backend: Backend, site: Site, batch: Batch, caches: tuple[Tensor, ...]) -> list[int]:
    """Fill what no sequence owns (and states that nobody goes on from) with NaN; the indices of what is owned."""
    if is_paged(backend, site):
        owned = {page for row in batch.rows for page in row.tables[site.group]} - {0}
        live = owned
    else:
        owned = {row.state_slot for row in batch.rows} - {0}
        live = {row.state_slot for row in batch.rows if row.context_len}
    for cache in caches:
        for index in set(range(len(cache))) - live:
            cache[index] = NAN
    return sorted(owned)


def assert_written(paged: bool, batch: Batch, before: Tensor, after: Tensor, owned: list[int]) -> None:
    """Nothing changed outside of what is owned and the scratch place 0, and inside only the new tokens' slots."""
    changed = (before != after) & ~(before.isnan() & after.isnan())
    others = sorted(set(range(1, len(before))) - set(owned))
    assert not changed[others].any()
    assert not after[owned].isnan()[before[owned].isfinite()].any()
    if paged:
        assert int(changed[owned].sum()) == batch.total * before[0, 0].numel()


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("backend", "site"), CASES)
def test_backend_is_the_canonical_op(backend: Backend, site: Site, lengths: list[tuple[int, int]]) -> None:
    check(backend, site, make_batch(lengths, num_groups=2, padding_rows=2, padding_tokens=3, spare_pages=1))


RUNNING = [backend for backend in backends() if any(case.values[0] is backend for case in CASES)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", RUNNING, ids=lambda backend: f"{backend.name}-{backend.kind}")
def test_backend_on_random_batches(backend: Backend, seed: int) -> None:
    shuffled = random.Random(seed)
    num_rows = shuffled.randint(1, 6)
    lengths = [
        (shuffled.choice([0, 1, 1, 1, shuffled.randint(2, 30)]), shuffled.choice([0, shuffled.randint(1, 70)]))
        for _ in range(num_rows)
    ]
    site = shuffled.choice([site for site in SITES.values() if site.kind == backend.kind])
    batch = make_batch(
        lengths,
        page_size=shuffled.choice([1, 4, 16]),
        num_groups=shuffled.randint(1, 2),
        padding_rows=shuffled.randint(0, 2),
        padding_tokens=shuffled.randint(0, 3),
        spare_pages=shuffled.randint(0, 3),
        seed=seed,
    )
    check(backend, site, batch)


STATEFUL = [case for case in CASES if isinstance(case.values[0].caches(case.values[1])[0], State)]


@pytest.mark.parametrize(("backend", "site"), STATEFUL)
def test_prompt_in_two_steps(backend: Backend, site: Site) -> None:
    """A state goes on wherever a prompt of 37 tokens was cut, each cut in a sequence of its own."""
    check(backend, site, make_batch([(37 - cut, cut) for cut in range(1, 37)]))


@pytest.mark.parametrize("backend", RUNNING, ids=lambda backend: f"{backend.name}-{backend.kind}")
@pytest.mark.parametrize("lengths", [BATCHES["mixed"], BATCHES["decode"]], ids=["mixed", "decode"])
def test_a_sequence_that_fails_fails_alone(backend: Backend, lengths: list[tuple[int, int]]) -> None:
    """The others' results are the same, bit for bit, when one sequence and its caches are NaN."""
    site = replace(next(site for site in SITES.values() if site.kind == backend.kind), page_size=4, num_groups=1)
    batch = make_batch(lengths)
    inputs = make_inputs(site, batch)
    caches = make_caches(backend, site, batch)
    step(backend, site, context_batch(batch), inputs, caches)
    same = tuple(cache.clone() for cache in caches)
    good = step(backend, site, batch, inputs, caches)
    for tensor, dim in zip(inputs.per_sequence[1], KINDS[site.kind].token_dims, strict=True):
        if tensor is not None and dim is not None:
            tensor.fill_(NAN)
    bad = step(backend, site, batch, inputs, same)
    begin = batch.rows[0].query_len
    end = begin + batch.rows[1].query_len
    assert bad[begin:end].isnan().any() or not bad.is_floating_point()
    assert torch.equal(torch.cat([bad[:begin], bad[end:]]), torch.cat([good[:begin], good[end:]]))


def check(backend: Backend, site: Site, batch: Batch) -> None:
    """Right in every kind of step that may run the batch."""
    torch.manual_seed(0)
    site = replace(site, page_size=batch.page_size, num_groups=batch.num_groups, group=batch.num_groups - 1)
    inputs = make_inputs(site, batch)
    caches = make_caches(backend, site, batch)
    step(backend, site, context_batch(batch), inputs, caches)
    batch = drop_unread_pages(batch, site.span)
    owned = poison_unowned(backend, site, batch, caches)
    for kind in step_kinds(batch):
        after = tuple(cache.clone() for cache in caches)
        with run_as(kind):
            out = step(backend, site, batch, inputs, after).cpu()
        check_result(backend, site, batch, inputs, out)
        for old, new in zip(caches, after, strict=True):
            assert_written(is_paged(backend, site), batch, old.double(), new.double(), owned)


def check_result(backend: Backend, site: Site, batch: Batch, inputs: Inputs, out: Tensor) -> None:
    """Each row of `out` [T, ...] is what the canonical op gives for the whole sequence."""
    atol, rtol = tolerance(backend, site)
    start = 0
    for index, row in enumerate(batch.rows):
        got = out[start : start + row.query_len]
        start += row.query_len
        if row.query_len:
            whole = tokens_first(site, KINDS[site.kind].run(tuple(inputs.of(site, index)), replace(site, device=CPU)))
            torch.testing.assert_close(got, whole[row.context_len :], atol=atol, rtol=rtol)
    assert not out.isnan().any()


def small_case(backend: Backend, site: Site, lengths: list[tuple[int, int]]) -> tuple[Site, Batch, tuple, list[Tensor]]:
    """The site with its cache plan, a batch, one step's tensors, and caches of ones."""
    site = replace(site, page_size=4, num_groups=1)
    batch = make_batch(lengths, padding_rows=1, padding_tokens=2)
    caches = [torch.ones_like(cache) for cache in make_caches(backend, site, batch)]
    return site, batch, pack(site, batch, make_inputs(site, batch)), caches


COMPILED = ("-attention-gqa", "-attention-all", "causal_conv1d-bias_silu", "gated_delta_rule-shared_keys")
COMPILED += ("latent_attention-plain", "ssd-groups", "selective_scan-all", *(f"{kind}-float32" for kind in RECURRENT))
COMPILED += ("latent_attention-sparse_all", "lightning_indexer-6")
COMPILED_CASES = [case for case in CASES if str(case.id).endswith(COMPILED)]


@pytest.mark.parametrize(("backend", "site"), COMPILED_CASES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, on import
def test_backend_compiles(backend: Backend, site: Site) -> None:
    planned, *_ = small_case(backend, site, BATCHES["mixed"])

    def run(tensors: tuple, layout: Tensor, caches: list[Tensor]) -> Tensor:
        num_tokens = tensors[0].shape[KINDS[planned.kind].token_dims[0]]
        metadata = backend.metadata(layout, num_tokens, planned)
        return backend.append_and_attend(tensors, tuple(caches), metadata, planned)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for lengths in (BATCHES["mixed"], BATCHES["chunk"]):
        _, batch, tensors, caches = small_case(backend, site, lengths)
        same = [cache.clone() for cache in caches]
        out, codes = run_and_get_code(compiled, tensors, batch.layout(), caches)
        torch.testing.assert_close(out, run(tensors, batch.layout(), same))
        torch.testing.assert_close(caches, same)
        for arguments in re.findall(r"(?:sdpa|reference)_\w+\.default\((.*)\)", "".join(codes)):
            # Caches go to the op as they came into the graph: Inductor made no copies.
            assert len(re.findall(r"\barg\d+_1\b", arguments)) >= len(caches)
            assert "copy" not in arguments


@pytest.mark.parametrize(("backend", "site"), COMPILED_CASES)
def test_cached_op_is_well_formed(backend: Backend, site: Site) -> None:
    planned, batch, tensors, caches = small_case(backend, site, BATCHES["mixed"])
    metadata = backend.metadata(batch.layout(), batch.num_tokens, planned)
    recorded = fx.Graph()
    tracer = GraphAppendingTracer(recorded)
    values: dict[fx.Node, object] = {}

    def proxies(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        node = recorded.placeholder(f"input_{len(values)}")
        values[node] = value
        return Proxy(node, tracer)

    backend.append_and_attend(*(tree_map(proxies, part) for part in (tensors, tuple(caches), metadata)), planned)
    ops = [node for node in recorded.nodes if getattr(node.target, "namespace", "") == "autodeploy"]
    for node in ops:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: values[arg])
        torch.library.opcheck(node.target, args, kwargs)


OP_SITES = ("attention-all", "attention-alibi_all", "causal_conv1d-bias_silu", "ssd-groups", "selective_scan-all")
OP_SITES += ("gated_delta_rule-shared_keys", "latent_attention-sparse_all", "lightning_indexer-6")
OP_SITES += tuple(f"{kind}-float32" for kind in RECURRENT)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 3, 5], dtype=torch.int32)])
@pytest.mark.parametrize("name", OP_SITES)
def test_canonical_op_is_well_formed(name: str, cu_seqlens: Tensor | None) -> None:
    kind, seen = KINDS[SITES[name].kind], []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            seen.append((func, args, kwargs))
            return func(*args, **(kwargs or {}))

    with Listen():
        kind.run(kind.operands(SITES[name], 6), SITES[name])
    args, kwargs = next((args, kwargs) for func, args, kwargs in seen if func is kind.op)
    arguments = kind.op._schema.arguments
    by_name = dict(zip((each.name for each in arguments), args, strict=False)) | {"cu_seqlens": cu_seqlens}
    args = [by_name.get(each.name) for each in arguments if not each.kwarg_only]
    torch.library.opcheck(kind.op, tuple(args), kwargs)


@pytest.mark.parametrize("slopes_by", ["distance", "key position"])
def test_slopes_are_a_bias(slopes_by: str) -> None:
    """Without sinks the softmax does not see where distances are counted from."""
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 5)
    slopes, index = torch.tensor([0.5, 0.25, 0.125, -1.0]), torch.arange(6)
    distance = index - index[:, None] if slopes_by == "distance" else index.expand(6, 6)
    scores = 0.3 * query @ key.mT + slopes[:, None, None] * distance
    expected = scores.masked_fill(index > index[:, None], -torch.inf).softmax(-1) @ value
    got = attention.attention(query, key, value, alibi_slopes=slopes, scale=0.3)
    torch.testing.assert_close(got, expected.transpose(1, 2))


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: f"{backend.name}-{backend.kind}")
def test_backend_records_on_proxies(backend: Backend) -> None:
    """What the passes do: metadata and call see no values and no sizes."""
    site = replace(next(site for site in SITES.values() if site.kind == backend.kind), page_size=4, num_groups=1)
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)

    def proxy(name: str) -> Proxy:
        return Proxy(graph.placeholder(name), tracer)

    layout, num_tokens = proxy("layout"), proxy("num_tokens")
    operands = enumerate(KINDS[site.kind].operands(site, 3))
    tensors = tuple(None if tensor is None else proxy(f"tensor_{index}") for index, tensor in operands)
    caches = tuple(proxy(cache.name) for cache in backend.caches(site))
    out = backend.append_and_attend(tensors, caches, backend.metadata(layout, num_tokens, site), site)
    assert isinstance(out, Proxy)
    graph.output(out.node)
    graph.lint()


def test_refusals_say_why() -> None:
    for site, reason in (
        (attention_site(dtype=torch.float16), "float16 is not supported on cpu"),
        (attention_site(causal=False), "not causal"),
        (attention_site(has_bias=True), "additive bias"),
    ):
        for backend in backends():
            if backend.kind == "attention":
                assert reason in (backend.why_not(site) or "")
