"""What a diff says: kinds, changes, folding, the story of the metadata, and that nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
from collections import Counter
from io import StringIO

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layout_graphs import OPS, random_module
from torch import fx, nn
from traces import before as before_pass
from traces import traced
from viz_graphs import Maker, aten, attention_layer, cached_layer, graph_module, layers

from autodeploy.compiler import pipeline
from autodeploy.errors import OptionError, UnknownName
from autodeploy.graph.edit import copy_module
from autodeploy.graph.meta import VALUE
from autodeploy.viz import GraphDiff, Recorder, Snapshot
from autodeploy.viz import text as terminal
from autodeploy.viz.arguments import Ref
from passes import ShareMetadata, default

DRAWS = st.lists(st.tuples(st.sampled_from(sorted(OPS)), *[st.integers(0, 20)] * 3), min_size=1, max_size=25)


def one(make: Maker, x: fx.Node) -> fx.Node:
    return make.call(aten.mul.Tensor, make.call(aten.sin.default, x, at="a"), 2, at="b")


def check_complete(diff: GraphDiff) -> None:
    """Every node is in one entry; only the survivors of mergers are in two."""
    seen = Counter(id for entry in diff.entries for id in entry.before)
    assert seen == Counter(node.id for node in diff.before.nodes)
    seen = Counter(id for entry in diff.entries if entry.kind != "merged" for id in entry.after)
    assert seen == Counter(node.id for node in diff.after.nodes)


@settings(max_examples=40, deadline=None)
@given(DRAWS)
def test_a_graph_does_not_differ_from_its_copy(draws: list[tuple[str, int, int, int]]) -> None:
    gm = random_module(draws)
    diff = GraphDiff.of(gm, copy_module(gm))
    assert diff.is_empty
    assert diff.lines() == []
    check_complete(diff)


@settings(max_examples=40, deadline=None)
@given(DRAWS, DRAWS)
def test_every_node_is_accounted_for(
    one: list[tuple[str, int, int, int]], other: list[tuple[str, int, int, int]]
) -> None:
    diff = GraphDiff.of(random_module(one), random_module(other))
    check_complete(diff)
    again = GraphDiff.from_json(json.loads(json.dumps(diff.to_json())))
    assert again == diff
    assert (str(again), again.to_json()) == (str(diff), diff.to_json())


@settings(max_examples=25, deadline=None)
@given(DRAWS)
@example([("add", 0, 0, 0)] * 4 + [("split", 0, 0, 0), ("add_", 9, 0, 0)])
def test_outlining_is_moving_and_merging(draws: list[tuple[str, int, int, int]]) -> None:
    """What share_metadata does is no change to anybody who reads or is read."""
    gm = random_module(draws)
    gm.graph.eliminate_dead_code()
    with Recorder() as recorder:
        pipeline.run(gm, [ShareMetadata()], [recorder])
    diff = recorder.trace().diff()
    check_complete(diff)
    assert {entry.kind for entry in diff.changed} <= {"moved", "rewired", "merged", "added", "removed"}


def test_kinds() -> None:
    def other(make: Maker, x: fx.Node) -> fx.Node:
        wide = make.call(aten.cos.default, make.call(aten.neg.default, x, at="n"), at="a")
        return make.call(aten.mul.Tensor, wide, 3, at="b")

    diff = GraphDiff.of(graph_module(one), graph_module(other))
    assert diff.lines() == ["a: - sin, + cos, neg", "b: ~ mul (other 2 -> 3)"]
    assert diff.summary()["kinds"] == {
        "unchanged": 2,
        "changed": 1,
        "moved": 0,
        "rewired": 0,
        "merged": 0,
        "replaced": 1,
        "removed": 0,
        "added": 0,
    }


def test_bypassed_and_inserted_nodes_do_not_change_their_readers() -> None:
    def longer(make: Maker, x: fx.Node) -> fx.Node:
        return make.call(
            aten.mul.Tensor, make.call(aten.neg.default, make.call(aten.sin.default, x, at="a"), at="n"), 2, at="b"
        )

    short, long = graph_module(one), graph_module(longer)
    assert GraphDiff.of(short, long).lines() == ["n: + neg"]
    (entry,) = GraphDiff.of(long, short).changed
    assert (entry.kind, [str(change) for change in entry.changes]) == ("removed", ["into: neg_default -> sin_default"])


def test_rewired_inputs_are_changes() -> None:
    def swapped(first: int):
        def build(make: Maker, x: fx.Node) -> fx.Node:
            parts = [make.call(aten.sin.default, x), make.call(aten.cos.default, x)]
            return make.call(aten.sub.Tensor, parts[first], parts[1 - first])

        return graph_module(build)

    (entry,) = GraphDiff.of(swapped(0), swapped(1)).changed
    assert [str(change) for change in entry.changes] == [
        "self: sin_default -> cos_default",
        "other: cos_default -> sin_default",
    ]


def test_shapes_dtypes_and_devices() -> None:
    def build(value: torch.Tensor) -> fx.GraphModule:
        return graph_module(lambda make, x: make.call(aten.sin.default, x, value=value))

    plain = torch.empty(2, 3, device="meta")
    cases = {
        "shape: [2, 3] -> [2, 4]": torch.empty(2, 4, device="meta"),
        "dtype: float32 -> float16": plain.half(),
        "device: meta -> cpu": torch.empty(2, 3),
    }
    for text, value in cases.items():
        (entry,) = GraphDiff.of(build(plain), build(value)).changed
        assert [str(change) for change in entry.changes] == [text]
    assert GraphDiff.of(build(plain), build(torch.empty(2, 3)), ignore=["device"]).is_empty


def test_symbols_may_have_other_names() -> None:
    before = Snapshot.of(traced("llama", 2))
    symbols = {str(size) for node in before.nodes for value in node.values for size in value.shape or ()} - {"1"}
    names = sorted(name for name in symbols if name.isidentifier())
    text = json.dumps(before.to_json())
    for index, name in enumerate(names):
        text = text.replace(f'"{name}"', f'"z{index}"')
    after = Snapshot.from_json(json.loads(text))
    assert after != before
    assert GraphDiff.of(before, after).is_empty


def test_order() -> None:
    def build(first: object, second: object) -> fx.GraphModule:
        def both(make: Maker, x: fx.Node) -> fx.Node:
            made = {op: make.call(op, x) for op in (first, second)}
            return make.call(aten.add.Tensor, made[aten.sin.default], made[aten.cos.default])

        return graph_module(both)

    before, after = build(aten.sin.default, aten.cos.default), build(aten.cos.default, aten.sin.default)
    (entry,) = GraphDiff.of(before, after).changed
    assert entry.kind == "moved"
    assert GraphDiff.of(before, after, ignore=["order"]).is_empty


def test_numbers_that_python_finds_equal_differ() -> None:
    graphs = [graph_module(lambda make, x, n=n: make.call(aten.add.Tensor, x, n)) for n in (1, 1.0, True)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not GraphDiff.of(graphs[one], graphs[other]).is_empty


def test_unknown_names_are_refused() -> None:
    gm = graph_module(one)
    with pytest.raises(UnknownName, match="did you mean 'names'"):
        GraphDiff.of(gm, gm, ignore=["name"])


def test_equal_layers_are_folded_and_the_odd_one_is_alone() -> None:
    def odd(index: int, make: Maker, x: fx.Node) -> fx.Node:
        return (attention_layer if index == 7 else cached_layer)(index, make, x)

    def odder(index: int, make: Maker, x: fx.Node) -> fx.Node:
        return attention_layer(index, make, make.call(aten.neg.default, x) if index == 3 else x)

    before = layers(30, odder)
    lines = GraphDiff.of(before, layers(30, cached_layer)).lines()
    assert lines == [
        "29 x layers.*.attn: - scaled_dot_product_attention, + 2 matmul, softmax",
        "layers.3: - neg",
        "layers.3.attn: - scaled_dot_product_attention, + 2 matmul, softmax",
    ]
    assert GraphDiff.of(layers(30, attention_layer), layers(30, odd)).lines() == [
        "29 x layers.*.attn: - scaled_dot_product_attention, + 2 matmul, softmax"
    ]
    tree = terminal.summary(GraphDiff.of(layers(30, attention_layer), layers(30, odd)))
    assert "29 x layers.* (0-6, 8-29)" in tree


def test_layers_that_differ_in_number_are_not_folded() -> None:
    def twice(index: int, make: Maker, x: fx.Node) -> fx.Node:
        for _ in range(1 + (index == 2)):
            x = make.call(aten.neg.default, x)
        return make.call(aten.sin.default, x)

    diff = GraphDiff.of(layers(4, lambda index, make, x: make.call(aten.sin.default, x)), layers(4, twice))
    assert diff.lines() == ["3 x layers.*: + neg", "2 x layers.2: + neg"]


@pytest.mark.parametrize("exact", [True, False])
def test_metadata_story(exact: bool) -> None:
    gm = before_pass("share_metadata", "gpt_oss")
    old = Snapshot.of(gm)
    with Recorder() as recorder:
        (record,) = pipeline.run(gm, [ShareMetadata()], [recorder])
    diff = recorder.trace().diff() if exact else GraphDiff.of(old, Snapshot.of(gm))
    story = diff.story
    assert story is not None
    # As the runner counts them in the graphs, by what they depend on.
    assert (story.before.nodes, story.after.nodes) == (record.before.metadata_nodes, record.after.metadata_nodes)
    assert story.before.nodes + story.beside == diff.counts["moved"] + diff.counts["merged"]
    assert story.before.launches > story.after.launches
    assert story.before.copies == story.after.copies == 2
    readers = {field.op: field.readers for field in story.fields}
    assert readers["cu_seqlens_q"] == {"sdpa_paged_attention": 4}
    assert readers["logits_indices"] == {"index_select": 1}
    assert "became one node" in str(diff)
    assert recorder.trace().story == story or not exact


def test_counts_are_those_of_the_nodes() -> None:
    """Each kind counted anew from ids: what is gone, what is new, and what reads from elsewhere."""
    gm = before_pass("share_metadata", "gemma3_text")
    with Recorder() as recorder:
        pipeline.run(gm, [ShareMetadata()], [recorder])
    diff = recorder.trace().diff()
    old, new = diff.before.by_id, diff.after.by_id
    both = old.keys() & new.keys()
    moved = {id for id in both if old[id].graph != new[id].graph}
    through = {node.id for node in diff.after.nodes if node.graph == "prepare_metadata"}
    direct = {id: {leaf.id for _, leaf in node.leaves if isinstance(leaf, Ref)} for id, node in old.items()}
    elsewhere = old.keys() - new.keys() | moved
    rewired = {id for id in both - moved if direct[id] & elsewhere and id not in through}
    assert diff.counts == {
        "unchanged": len(both - moved - rewired),
        "changed": 0,
        "moved": len(moved),
        "rewired": len(rewired),
        "merged": len(old.keys() - new.keys()) - diff.counts["removed"],
        "replaced": 0,
        "removed": diff.counts["removed"],
        "added": len(new.keys() - old.keys()),
    }
    targets = Counter(old[id].short_target for id in rewired)
    assert targets["sdpa_paged_attention"] == 4
    assert sum(diff.counts.values()) - diff.counts["added"] == len(old)


def test_weights() -> None:
    """Values and dtypes of what a graph holds, as they are now."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.weight = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.weight

    def model() -> fx.GraphModule:
        gm = fx.symbolic_trace(Scaled())
        for node in gm.graph.find_nodes(op="get_attr"):
            VALUE.set(node, torch.ones(3, device="meta"))  # as it was when it was traced
        return gm

    before, after = model(), model()
    assert GraphDiff.of(before, after).is_empty
    with torch.no_grad():
        after.weight[1] = 2  # type: ignore[index]
    assert [str(change.what) for entry in GraphDiff.of(before, after).changed for change in entry.changes] == ["values"]
    after = model()
    after.weight = nn.Parameter(torch.ones(3).half())
    whats = [change.what for entry in GraphDiff.of(before, after).changed for change in entry.changes]
    assert sorted(whats) == ["dtype", "values"]
    after = model()
    after.linear.bias.data.zero_()  # type: ignore[union-attr]
    (entry,) = GraphDiff.of(before, after).changed
    assert [change.what for change in entry.changes] == ["values"]


def test_no_story_without_metadata() -> None:
    assert GraphDiff.of(graph_module(one), graph_module(one)).story is None


def test_merged() -> None:
    def doubled(number: int):
        def build(make: Maker, x: fx.Node) -> fx.Node:
            parts = [make.call(aten.sin.default, x) for _ in range(number)]
            return make.call(aten.cat.default, [parts[index % number] for index in range(4)])

        return graph_module(build)

    diff = GraphDiff.of(doubled(4), doubled(1))
    assert diff.lines() == ["= sin for 3 duplicates", "< cat (reads 3 that were merged)"]
    assert GraphDiff.of(doubled(4), doubled(1), ignore=["wiring"]).lines() == ["= sin for 3 duplicates"]
    assert diff.counts["merged"] == 3


def test_text_of_the_whole_pipeline() -> None:
    with Recorder() as recorder:
        pipeline.run(traced("llama"), default(), [recorder])
    text = str(recorder.trace().diff())
    assert "4 x model.layers.* (0-3)" in text
    assert "- attention, + sdpa_paged_attention" in text
    assert "\033" not in text
    index = recorder.trace().index("share_metadata")
    told = recorder.trace().diff(index - 1, index).story
    assert told is not None
    assert max(map(len, terminal.story(told).splitlines())) <= 80


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_color_only_for_terminals_that_want_it(no_color: str, colored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("COLUMNS", "50")
    diff = GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer))
    terminals, plain = Terminal(), StringIO()
    terminal.print_diff(diff, terminals)
    terminal.print_diff(diff, plain)
    assert ("\033[3" in terminals.getvalue()) == colored
    assert max(len(re.sub(r"\033\[[0-9;]*m", "", line)) for line in terminals.getvalue().splitlines()) <= 50
    assert plain.getvalue() == f"{diff}\n"


def test_stable_order() -> None:
    texts = {json.dumps(GraphDiff.of(layers(5, attention_layer), layers(5, cached_layer)).to_json()) for _ in range(3)}
    assert len(texts) == 1


@pytest.mark.parametrize("ending", ["txt", "json", "svg", "dot", "me.json"])
def test_save(ending: str, tmp_path) -> None:
    path = tmp_path / f"diff.{ending}"
    GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer)).save(path)
    assert "scaled_dot_product_attention" in path.read_text()


def test_unknown_endings_are_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match="cannot save a GraphDiff as"):
        GraphDiff.of(graph_module(one), graph_module(one)).save(tmp_path / "diff.png")


def test_a_value_that_is_missing_is_no_change() -> None:
    gm = graph_module(lambda make, x: make.call(aten.sin.default, x, value=torch.ones(2)))
    snapshot = Snapshot.of(gm)
    nodes = tuple(dataclasses.replace(node, values=()) for node in snapshot.nodes)
    assert GraphDiff.of(snapshot, Snapshot(nodes)).is_empty


def test_getitem_of_moved_lists() -> None:
    """A tuple that a called graph returns is taken apart behind it."""

    def split(make: Maker, x: fx.Node) -> fx.Node:
        parts = make.call(aten.split.Tensor, x, 1)
        return make.call(aten.add.Tensor, *(make.graph.call_function(operator.getitem, (parts, n)) for n in (0, 1)))

    assert GraphDiff.of(graph_module(split), graph_module(split)).is_empty
