"""What `find_attention` and `nest_inputs` refuse: values that pass between tokens, and places the model counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.meta import VALUE
from autodeploy.graph.tokens import Carries, token_flow
from autodeploy.ops.kinds.attention import attention
from passes import FindAttention, NestInputs
from passes.canonicalize import Canonicalize

NUM_EXPERTS, TOP_K, SIZE = 4, 2, 8
Body = Callable[[Tensor, Tensor], Tensor]


class Model(torch.nn.Module):
    """Embedding, one attention, `body(hidden [B, S, 8], position_ids [B, S])`, and a linear head."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.embedding = torch.nn.Embedding(16, SIZE)
        self.table = torch.nn.Buffer(torch.randn(64, SIZE))
        self.head = torch.nn.Linear(SIZE, 16)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        heads = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
        hidden = hidden + attention(heads, heads, heads, scale=0.5).flatten(2)
        return self.head(self.body(hidden, position_ids))


def traced(body: Body) -> fx.GraphModule:
    inputs = {"input_ids": torch.zeros(3, 12, dtype=torch.int64), "position_ids": torch.arange(12).repeat(3, 1)}
    dims = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(Model(body), (), inputs, dynamic_shapes=dims, strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    Canonicalize().apply(gm)
    return gm


def route(hidden: Tensor, position_ids: Tensor) -> Tensor:
    """Sorts tokens by expert, as transformers' grouped experts do, and puts them back in order."""
    tokens = hidden.flatten(0, 1)
    weights, experts = torch.topk(tokens[:, :NUM_EXPERTS].softmax(-1), TOP_K)
    order = torch.argsort(experts.flatten())
    counts = torch.histc(experts.flatten().float(), NUM_EXPERTS, 0, NUM_EXPERTS - 1)
    ends = counts.cumsum(0).to(torch.int32)
    matrices = torch.ones(NUM_EXPERTS, SIZE, SIZE, dtype=torch.bfloat16)
    out = torch._grouped_mm(tokens[order // TOP_K].bfloat16(), matrices, offs=ends).float()
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    return ((out * weights.flatten()[order, None])[back].view(-1, TOP_K, SIZE).sum(1)).view_as(hidden)


def dense_experts(hidden: Tensor, position_ids: Tensor) -> Tensor:
    tokens = hidden.flatten(0, 1)
    weights, experts = torch.topk(tokens[:, :NUM_EXPERTS], TOP_K)
    scores = torch.zeros(tokens.shape[0], NUM_EXPERTS).scatter(1, experts, weights)
    every = torch.bmm(tokens.expand(NUM_EXPERTS, -1, -1), torch.ones(NUM_EXPERTS, SIZE, SIZE))
    return (every * scores.t().unsqueeze(-1)).sum(0).view_as(hidden)


def rope(hidden: Tensor, position_ids: Tensor) -> Tensor:
    frequencies = torch.arange(SIZE).float()[None, :, None].expand(position_ids.shape[0], -1, 1)
    return hidden * (frequencies @ position_ids[:, None].float()).transpose(1, 2).cos()


def overwrite(hidden: Tensor, position_ids: Tensor) -> Tensor:
    out = torch.zeros_like(hidden)
    out[..., 0].copy_(hidden[..., 1])
    return hidden + out


@torch.library.custom_op("autodeploy_test::view", mutates_args=())
def foreign_view(x: Tensor) -> Tensor:
    """Called as an op of ATen, but a sum over the tokens before each."""
    return x.cumsum(1)


@foreign_view.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _scan(x: Tensor) -> Tensor:
    def step(carry: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return carry + token, carry * 1

    return scan(step, torch.zeros(x.shape[0], SIZE), x, dim=1)[1].transpose(0, 1)


ALLOWED: dict[str, Body] = {
    "pointwise": lambda x, p: F.silu(x).multiply(x) + x.pow(2).mean(-1, keepdim=True),
    "norms": lambda x, p: F.layer_norm(F.rms_norm(x, (SIZE,)), (SIZE,)),
    "matmul": lambda x, p: (x.transpose(1, 2).transpose(1, 2) @ torch.ones(SIZE, SIZE)).flip(-1).softmax(-1),
    "einsum": lambda x, p: torch.einsum("bsh,bsk->bsk", x, x),
    "flattened addmm": lambda x, p: torch.addmm(torch.ones(SIZE), x.view(-1, SIZE), torch.ones(SIZE, SIZE)).view_as(x),
    "heads": lambda x, p: torch.cat([x.unflatten(-1, (2, 4)).transpose(1, 2)] * 2, -1).sum(1),
    "all of one choice": lambda x, p: torch.where((x > 0).all(-1, keepdim=True), x, 0),
    "routing": route,
    "dense experts": dense_experts,
    "rope": rope,
    "in-place": overwrite,
    "ones": lambda x, p: x * torch.ones(x.shape[:2]).unsqueeze(-1),
}

MIXES: dict[str, tuple[Body, str]] = {
    "cumsum": (lambda x, p: x.cumsum(1), "runs along the sequence"),
    "softmax": (lambda x, p: x.softmax(1), "runs along the sequence"),
    "flip": (lambda x, p: x.flip(1), "runs along the sequence"),
    "roll": (lambda x, p: x.roll(1, 1), "runs along the sequence"),
    "time shift": (lambda x, p: F.pad(x, (0, 0, 1, -1)), "runs along the sequence"),
    "sort": (lambda x, p: x.sort(1).values, "runs along the sequence"),
    "convolution": (
        lambda x, p: F.conv1d(x.transpose(1, 2), torch.ones(SIZE, SIZE, 3), padding=1).transpose(1, 2),
        "came through no door of causal_conv1d",
    ),
    "group norm": (lambda x, p: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2), "not known to treat tokens alone"),
    "mean": (lambda x, p: x - x.mean(1, keepdim=True), "reduces over tokens"),
    "last token": (lambda x, p: x + x[:, -1:], "reduces over tokens"),
    "shift": (lambda x, p: torch.cat([x[:, 1:], x[:, :1]], 1), "cuts, pads or joins"),
    "join": (lambda x, p: torch.cat([x, x], 1)[:, : x.shape[1]], "runs along the sequence"),
    "scores": (lambda x, p: (x @ x.transpose(1, 2)).softmax(-1) @ x, "relates tokens to one another"),
    "reshape": (lambda x, p: x + x.reshape(x.shape[0], SIZE, -1).transpose(1, 2), "reshapes one token's values"),
    "tokens side by side": (
        lambda x, p: torch.cat([x, x], -1).view(x.shape[0], 2, x.shape[1], SIZE)[:, 0],
        "relates tokens",
    ),
    "einsum": (lambda x, p: torch.einsum("bsh,bth->bsh", x, x), "runs along the sequence"),
    "copies of the batch read as copies of tokens": (
        lambda x, p: x.reshape(-1, SIZE).repeat(3, 1).view(-1, 3, SIZE).sum(1).view_as(x),
        "reshapes one token",
    ),
    "copies in a new dimension read as copies of tokens": (
        lambda x, p: x.reshape(-1, SIZE).repeat(1, 3, 1).view(-1, 3, SIZE).sum(1).view_as(x),
        "reshapes one token",
    ),
    "two ways of copying": (
        lambda x, p: (
            (x.reshape(-1, SIZE).repeat(3, 1) + x.reshape(-1, SIZE).repeat_interleave(3, 0))
            .view(3, -1, SIZE)
            .sum(0)
            .view_as(x)
        ),
        "reshapes one token",
    ),
    "repeat": (lambda x, p: x.repeat(1, 2, 1).view(x.shape[0], -1, 2, SIZE).sum(2), "reshapes one token"),
    "linear attention": (lambda x, p: x @ (x.transpose(1, 2) @ x), "reduces over tokens"),
    "sum by matmul": (lambda x, p: torch.ones(x.shape[1], x.shape[1]) @ x, "relates tokens to one another"),
    "pick by place": (lambda x, p: x[:, torch.arange(x.shape[1]) // 2], "picks tokens by their place"),
    "pick by position": (lambda x, p: torch.gather(x, 1, p[..., None].expand_as(x)), "picks tokens by their place"),
    "pick by a place computed in floats": (
        lambda x, p: x[:, (torch.arange(x.shape[1]).float() / 2).long()],
        "picks tokens by their place",
    ),
    "einsum of any dimensions": (lambda x, p: torch.einsum("...h,...h->...h", x, x), "labels are not all written out"),
    "pick by position from behind": (
        lambda x, p: torch.gather(x, -2, p[..., None].expand_as(x)),
        "picks tokens by their place",
    ),
    "places of sorted choices": (
        lambda x, p: x * (x[..., 0] > 0).long().sort(1).indices.unsqueeze(-1),
        "uses a count over the tokens",
    ),
    "weights of choices": (
        lambda x, p: F.pad(x.topk(2, -1).values.cumsum(1), (0, SIZE - 2)),
        "runs along the sequence",
    ),
    "share of an expert": (lambda x, p: x * (x > 0).float().mean(1, keepdim=True), "uses a count over the tokens"),
    "repeated, then cut": (lambda x, p: x.repeat_interleave(2, 1)[:, : x.shape[1]], "runs along the sequence"),
    "repeated flat": (lambda x, p: x.repeat_interleave(2).view(x.shape[0], -1, SIZE, 2).sum(-1), "not known to treat"),
    "dropout": (lambda x, p: torch.dropout(x, 0.5, True), "drops values at random"),
    "norm over tokens": (
        lambda x, p: F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2),
        "runs along the sequence",
    ),
    "norm of all but channels": (lambda x, p: x.renorm(2, 2, 1.0), "not known to treat tokens alone"),
    "tokens as a table": (lambda x, p: F.embedding(p[0], x[0]).expand_as(x), "picks tokens by their place"),
    "einsum of a second factor": (
        lambda x, p: torch.einsum("bsh,th->bsh", x, x[0]),
        "runs along the sequence",
    ),
    "rank of a choice": (
        lambda x, p: x * (x[..., 0] > 0).long().argsort(1).unsqueeze(-1),
        "uses a count over the tokens",
    ),
    "foreign op": (lambda x, p: torch.ops.autodeploy_test.view(x), "not known to treat tokens alone"),
    "loop": (lambda x, p: _scan(x), "reduces over tokens"),
    "largest position": (lambda x, p: x * p.max(), "reduces over tokens"),
}


def _learned_positions(hidden: Tensor, position_ids: Tensor) -> Tensor:
    return hidden + F.embedding(torch.arange(hidden.shape[1]), torch.ones(64, SIZE))


def _counted_in_place(hidden: Tensor, position_ids: Tensor) -> Tensor:
    places = torch.zeros(hidden.shape[1])
    places[:].add_(torch.arange(hidden.shape[1]))
    return hidden + places[:, None]


COUNTS_PLACES: dict[str, Body] = {
    "cumsum of other numbers": lambda x, p: x + torch.full(x.shape[:2], 2).cumsum(1).unsqueeze(-1),
    "every other entry": lambda x, p: x + torch.ones(64, SIZE)[: 2 * x.shape[1] : 2],
    "across rows": lambda x, p: x * torch.arange(x.shape[0] * x.shape[1]).view(*x.shape[:2], 1),
    "backwards": lambda x, p: x * torch.arange(x.shape[1]).flip(0)[:, None],
    "length": lambda x, p: x * x.shape[1],
}
POSITIONS: dict[str, Body] = {
    "learned positions": _learned_positions,
    "both kinds": lambda x, p: x * (1 + p - torch.arange(x.shape[1])).unsqueeze(-1),
    "in-place": _counted_in_place,
    "slice of a table": lambda x, p: x + torch.linspace(0, 1, 64 * SIZE).view(64, SIZE)[2 : x.shape[1] + 2],
    "slice of a buffer, looked up": lambda x, p: x + torch.eye(64, SIZE)[torch.arange(64)[None, : x.shape[1]]],
    "cumsum of ones": lambda x, p: x + (torch.ones(x.shape[:2]).long().cumsum(1) - 1).unsqueeze(-1),
    "from one on": lambda x, p: x * torch.arange(1, x.shape[1] + 1)[:, None],
    "scaled": lambda x, p: x * torch.log1p(torch.floor((torch.arange(x.shape[1]).float() + 1) / 4))[:, None],
}


@pytest.mark.parametrize("case", ALLOWED)
def test_allowed(case: str) -> None:
    gm = traced(ALLOWED[case])
    assert FindAttention().apply(gm) == 1
    assert NestInputs().apply(gm) == 1


@pytest.mark.parametrize("case", MIXES)
def test_mixing_is_refused(case: str) -> None:
    body, reason = MIXES[case]
    gm = traced(body)
    FindAttention().apply(gm)
    before = str(gm.graph)
    with pytest.raises(UnsupportedFeature, match=reason) as caught:
        NestInputs().apply(gm)
    assert ("test_mixing.py" in caught.value.where) == (case != "loop")  # whose source line torch loses
    assert str(gm.graph) == before


@pytest.mark.parametrize("case", COUNTS_PLACES)
def test_counted_places_are_refused(case: str) -> None:
    gm = traced(COUNTS_PLACES[case])
    FindAttention().apply(gm)
    before = str(gm.graph)
    with pytest.raises(UnsupportedFeature, match="that the model counted itself") as caught:
        NestInputs().apply(gm)
    assert "test_mixing.py" in caught.value.where
    assert str(gm.graph) == before


def check_packed(body: Body) -> None:
    """Sequences of 5, 1 and 9 tokens, padded by two tokens, give packed what each gives alone."""
    gm = traced(body)
    FindAttention().apply(gm)
    lengths, ids = [5, 1, 9], torch.arange(15) % 16
    alone = [fx.Interpreter(gm).run(row[None], torch.arange(len(row))[None])[0] for row in ids.split(lengths)]
    assert NestInputs().apply(gm) == 1
    layout = torch.tensor([[length, 0, 0] for length in lengths], dtype=torch.int32)
    packed = fx.Interpreter(gm).run(F.pad(ids, (0, 2)).int(), layout)
    torch.testing.assert_close(packed[0, : len(ids)], torch.cat(alone))


@pytest.mark.parametrize("case", POSITIONS)
def test_counted_positions_are_those_of_each_sequence(case: str) -> None:
    check_packed(POSITIONS[case])


@pytest.mark.parametrize("repeats", [(3, 1), (1, 3, 1)])
def test_whole_copies_of_the_batch_are_told_from_copies_of_each_token(repeats: tuple[int, ...]) -> None:
    """As Llama 4's experts have them: each sees all tokens, and what it gives is summed."""
    scores = torch.linspace(0.5, 2.0, SIZE * 3).view(SIZE, 3)

    def experts(x: Tensor, p: Tensor) -> Tensor:
        tokens = x.reshape(-1, SIZE)
        weights = (tokens @ scores).t().reshape(-1, 1)
        return (tokens.repeat(repeats) * weights).view(3, -1, SIZE).sum(0).view_as(x)

    check_packed(experts)


def test_what_each_node_carries() -> None:
    gm = traced(route)
    carries = token_flow(
        gm, gm.graph.find_nodes(op="call_function", target=torch.ops.autodeploy.attention.default)
    ).carries
    by_op = {str(node.target).removeprefix("aten.").split(".")[0]: kind for node, kind in carries.items()}
    assert by_op["embedding"] is by_op["_grouped_mm"] is by_op["linear"] is Carries.TOKENS
    assert by_op["argsort"] is by_op["cumsum"] is by_op["histc"] is by_op["empty_like"] is Carries.COUNTS
    assert by_op["arange"] is Carries.PLACES


def test_a_choice_may_compare_activations_with_integers() -> None:
    gm = traced(lambda x, p: x * (x[..., :1] > p[..., None]))
    carries = token_flow(gm, ()).carries
    (choice,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.gt.Tensor)
    assert carries[choice] is Carries.CHOICES


@pytest.mark.parametrize("dims", [{}, {1: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}])
def test_a_graph_of_fixed_sizes_is_refused(dims: dict[int, object]) -> None:
    """Its token dimensions cannot be told from others, and sizes of the padded batch are baked in."""
    model, shapes = Model(lambda x, p: x.cumsum(1)), {"input_ids": dims, "position_ids": dims}
    inputs = {"input_ids": torch.zeros(3, 12, dtype=torch.int64), "position_ids": torch.arange(12).repeat(3, 1)}
    gm = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    before = str(gm.graph)
    with pytest.raises(UnsupportedFeature, match="a graph of fixed sizes"):
        NestInputs().apply(gm)
    assert str(gm.graph) == before


@pytest.mark.parametrize(("body", "is_read"), [(lambda x, p: x * p.sum(), True), (lambda x, p: x, False)])
def test_positions_of_a_fixed_length_are_refused_where_they_are_read(body: Body, is_read: bool) -> None:
    gm = traced(body)
    (positions,) = (node for node in gm.graph.find_nodes(op="placeholder") if node.name == "position_ids")
    VALUE.set(positions, torch.zeros(3, 12, dtype=torch.int64))
    with pytest.raises(UnsupportedFeature, match="a graph of fixed sizes") if is_read else nullcontext():
        token_flow(gm, ())


@pytest.mark.parametrize("case", ["cumsum", "flip", "sort"])
def test_a_node_without_a_recorded_value_is_refused(case: str) -> None:
    gm = traced(MIXES[case][0])
    FindAttention().apply(gm)
    for node in gm.graph.nodes:
        if case in str(node.target):
            VALUE.take(node)
    with pytest.raises(UnsupportedFeature, match="has no recorded value and cannot be judged"):
        NestInputs().apply(gm)
