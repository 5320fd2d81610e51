"""The history of a graph: every link is exact, a pass that fails is kept, and nothing is left behind in the graph."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx
from traces import text, traced
from viz_graphs import Maker, aten, attention_layer, graph_module, layers

from autodeploy.compiler import pipeline
from autodeploy.errors import OptionError, PassError, UnknownName
from autodeploy.graph.edit import PREPARE
from autodeploy.viz.history import Stage
from autodeploy.viz.provenance import Recorder
from autodeploy.viz.snapshot import Snapshot
from autodeploy.viz.trace import Trace
from passes import default


@dataclass(frozen=True)
class Step:
    """A pass that runs `rewrite`."""

    rewrite: Callable[[fx.GraphModule], object]
    name: str = "step"

    def apply(self, gm: fx.GraphModule) -> int:
        self.rewrite(gm)
        return 1


def history(gm: fx.GraphModule, *rewrites: Callable[[fx.GraphModule], object]) -> Trace:
    with Recorder() as recorder:
        pipeline.run(gm, [Step(rewrite, f"step {index}") for index, rewrite in enumerate(rewrites)], [recorder])
    return recorder.trace()


def find(gm: fx.GraphModule, target: object) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[0]


def ids(trace: Trace, stage: int) -> dict[str, int]:
    return {node.name: node.id for node in trace.stages[stage].snapshot.nodes}


def two_negations() -> fx.GraphModule:
    def build(make: Maker, x: fx.Node) -> fx.Node:
        return make.call(aten.add.Tensor, make.call(aten.neg.default, x), make.call(aten.neg.default, x))

    return graph_module(build)


def replace_neg(gm: fx.GraphModule) -> None:
    node = find(gm, aten.neg.default)
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(aten.mul.Tensor, (node.args[0], -1))
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def replace_mul(gm: fx.GraphModule) -> None:
    node = find(gm, aten.mul.Tensor)
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(aten.div.Tensor, node.args)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def merge_negs(gm: fx.GraphModule) -> None:
    first, second = gm.graph.find_nodes(op="call_function", target=aten.neg.default)
    second.replace_all_uses_with(first)
    gm.graph.erase_node(second)


def test_a_replacement_is_linked() -> None:
    trace = history(two_negations(), replace_neg)
    before, after = ids(trace, 0), ids(trace, 1)
    assert trace.stages[1].into == {before["neg_default"]: (after["mul_tensor"],)}
    assert trace.made_by(after["mul_tensor"]) == "step 0"
    assert trace.origins(after["mul_tensor"]) == (before["neg_default"],)
    assert before["neg_default_1"] == after["neg_default_1"]


def test_links_of_several_passes_are_one() -> None:
    trace = history(two_negations(), replace_neg, replace_mul)
    assert trace.links(0, 2).into == {ids(trace, 0)["neg_default"]: (ids(trace, 2)["div_tensor"],)}
    assert [entry.kind for entry in trace.diff().changed] == ["replaced"]


def test_replacements_within_one_pass_are_followed() -> None:
    def both(gm: fx.GraphModule) -> None:
        replace_neg(gm)
        replace_mul(gm)

    trace = history(two_negations(), both)
    assert trace.stages[1].into == {ids(trace, 0)["neg_default"]: (ids(trace, 1)["div_tensor"],)}


def test_a_duplicate_is_merged() -> None:
    trace = history(two_negations(), merge_negs)
    names = ids(trace, 0)
    assert trace.links(0, 1).merged == {names["neg_default_1"]: names["neg_default"]}
    assert trace.diff().lines() == ["= neg for 1 duplicates", "< add (reads 1 that were merged)"]


def test_a_merger_survives_the_replacement_of_the_survivor() -> None:
    trace = history(two_negations(), merge_negs, replace_neg)
    (entry,) = trace.diff().changed
    assert (entry.kind, len(entry.before), len(entry.after)) == ("replaced", 2, 1)


def test_renaming_is_no_replacement() -> None:
    def rename(gm: fx.GraphModule) -> None:
        find(gm, aten.neg.default).name = "minus"

    trace = history(two_negations(), rename)
    assert trace.stages[1].into == {}
    (entry,) = trace.diff().changed
    assert [str(change) for change in entry.changes] == ["name: neg_default -> minus"]
    assert trace.diff(ignore=["names"]).is_empty


def test_changed_in_place() -> None:
    def change(gm: fx.GraphModule) -> None:
        node = find(gm, aten.neg.default)
        node.target = aten.abs.default
        find(gm, aten.add.Tensor).kwargs = {"alpha": 2}

    (neg, add) = history(two_negations(), change).diff().changed
    assert [change.what for change in neg.changes] == ["target"]
    assert [str(change) for change in add.changes] == ["alpha: (absent) -> 2"]


def test_arguments_set_by_hand_are_seen() -> None:
    """FX reports no replacement where a pass writes to args, but the users tell."""

    def bypass(gm: fx.GraphModule) -> None:
        old = find(gm, aten.neg.default)
        with gm.graph.inserting_after(old):
            new = gm.graph.call_function(aten.abs.default, old.args)
        find(gm, aten.add.Tensor).args = (new, find(gm, aten.add.Tensor).args[1])

    trace = history(two_negations(), bypass)
    assert trace.stages[1].into == {ids(trace, 0)["neg_default"]: (ids(trace, 1)["abs_default"],)}


def test_a_rebuilt_graph_keeps_its_ids() -> None:
    """A pass that copies every node into a new graph changes nothing."""

    def rebuild(gm: fx.GraphModule) -> None:
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        gm.graph = graph

    gm = layers(3, attention_layer)
    trace = history(gm, rebuild)
    assert [node.name for node in trace.stages[1].snapshot.nodes][:-1] == [
        node.name for node in trace.stages[0].snapshot.nodes
    ][:-1]
    assert trace.diff().is_empty


def test_a_copy_beside_its_original_is_new() -> None:
    def duplicate(gm: fx.GraphModule) -> None:
        node = find(gm, aten.neg.default)
        with gm.graph.inserting_after(node):
            copied = gm.graph.node_copy(node)
        find(gm, aten.add.Tensor).replace_input_with(node, copied)
        gm.graph.output_node().args = ((gm.graph.output_node().args[0], node),)

    trace = history(two_negations(), duplicate)
    after = ids(trace, 1)
    (new,) = after.keys() - ids(trace, 0).keys()
    assert trace.origins(after[new]) == (ids(trace, 0)["neg_default"],)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "lfm2"])
def test_pipeline(model_type: str) -> None:
    gm = traced(model_type)
    with Recorder() as recorder:
        records = pipeline.run(gm, default(), [recorder])
    trace = recorder.trace()
    assert [stage.name for stage in trace.stages] == ["start", *(record.name for record in records)]
    assert [stage.matches for stage in trace.stages[1:]] == [record.matches for record in records]
    index = [stage.name for stage in trace.stages].index("share_metadata")
    diff = trace.diff(index - 1, index)
    # Of 1 * T nothing is left: T is there already.
    removed = [entry for entry in diff.changed if entry.kind == "removed"]
    assert all(diff.before.by_id[id].target == "operator.mul" for entry in removed for id in entry.before)
    assert {entry.kind for entry in diff.changed} - {"removed"} == {"moved", "rewired", "merged", "added"}
    plumbing = (*("placeholder", "output", "call_module"), "operator.getitem")
    added = [node for entry in diff.changed if entry.kind == "added" for node in map(diff.after.by_id.get, entry.after)]
    assert all(node.op in plumbing or node.target in plumbing for node in added if node)
    assert trace.story is not None
    assert trace.story.subgraphs > trace.story.before.nodes / 10
    assert trace.story == diff.story
    assert trace.diff().story is None  # of another pair of graphs: that of one pass is told once


def test_recording_changes_nothing() -> None:
    plain, watched = traced("llama"), traced("llama")
    pipeline.run(plain, default())
    keys = [set(node.meta) for node in plain.graph.nodes]
    with Recorder() as recorder:
        pipeline.run(watched, default(), [recorder])
    assert text(plain) == text(watched)
    assert [set(node.meta) for node in watched.graph.nodes] == keys
    inner = watched.get_submodule(PREPARE)
    assert isinstance(inner, fx.GraphModule)
    assert all("autodeploy_node_id" not in node.meta for node in inner.graph.nodes)
    assert watched._create_node_hooks == watched._erase_node_hooks == watched._replace_hooks == []


def test_a_pass_that_raises_is_the_last_stage() -> None:
    def fail(gm: fx.GraphModule) -> None:
        replace_neg(gm)
        find(gm, aten.add.Tensor).args = ()
        raise ZeroDivisionError("half-way")

    gm = two_negations()
    recorder = Recorder()
    with pytest.raises(PassError, match="half-way"), recorder:
        pipeline.run(gm, [Step(merge_nothing), Step(fail, "broken")], [recorder])
    trace = recorder.trace()
    last = trace.stages[-1]
    assert (last.name, last.error) == ("broken", "PassError: pass 'broken' failed: ZeroDivisionError: half-way")
    assert "mul_tensor" in ids(trace, -1)
    assert [entry.kind for entry in trace.diff(-2, -1).changed] == ["replaced", "changed"]
    assert Trace.from_json(json.loads(json.dumps(trace.to_json()))) == trace
    assert gm._create_node_hooks == []


def merge_nothing(gm: fx.GraphModule) -> None:
    pass


def test_a_graph_left_broken_is_still_drawn() -> None:
    def fail(gm: fx.GraphModule) -> None:
        node = find(gm, aten.neg.default)
        foreign = fx.Graph().placeholder("elsewhere")
        object.__setattr__(find(gm, aten.add.Tensor), "_args", (foreign, node))
        raise ZeroDivisionError

    recorder = Recorder()
    with pytest.raises(PassError), recorder:
        pipeline.run(two_negations(), [Step(fail)], [recorder])
    assert str(recorder.trace().diff())


def test_copies_made_by_a_pass_are_not_watched() -> None:
    kept: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule) -> None:
        kept.append(copy.deepcopy(gm))
        replace_neg(kept[0])

    trace = history(two_negations(), keep)
    assert trace.diff().is_empty


def test_json_holds_a_node_once() -> None:
    trace = history(layers(4, attention_layer), merge_nothing, merge_nothing)
    data = json.loads(json.dumps(trace.to_json()))
    assert len(data["nodes"]) == len(trace.stages[0].snapshot.nodes)
    assert Trace.from_json(data) == trace


def test_json_tells_numbers_apart() -> None:
    def to_float(gm: fx.GraphModule) -> None:
        find(gm, aten.add.Tensor).args = (find(gm, aten.add.Tensor).args[0], 1.0)

    gm = graph_module(lambda make, x: make.call(aten.add.Tensor, x, 1))
    trace = history(gm, to_float)
    again = Trace.from_json(json.loads(json.dumps(trace.to_json())))
    assert [str(change) for change in again.diff().changed[0].changes] == ["other: 1 -> 1.0"]


def test_other_data_is_refused() -> None:
    snapshot = Snapshot.of(two_negations())
    with pytest.raises(OptionError, match="trace/1"):
        Trace.from_json(snapshot.to_json())


def test_getitem_of_a_list_is_no_call() -> None:
    """What is not a called graph's result is not seen through."""

    def build(make: Maker, x: fx.Node) -> fx.Node:
        parts = make.call(aten.split.Tensor, x, 1)
        return make.graph.call_function(operator.getitem, (parts, 0))

    assert Snapshot.of(graph_module(build)).source_of == {}


def test_anybodys_pass() -> None:
    """Code in a `with` block is a step, without a pipeline; a second one follows."""
    gm = two_negations()
    with Recorder(gm, "mine") as recorder:
        replace_neg(gm)
    with recorder.step(gm, "another"):
        replace_mul(gm)
    trace = recorder.trace()
    assert repr(trace) == "Trace(start -> mine -> another)"
    assert [stage.error for stage in trace.stages] == ["", "", ""]
    assert [entry.kind for entry in trace.diff("start", "another").changed] == ["replaced"]
    assert all("autodeploy_node_id" not in node.meta for node in gm.graph.nodes)
    with pytest.raises(UnknownName, match="unknown stage 'anothr'"):
        trace.diff("start", "anothr")


def test_anybodys_pass_that_raises() -> None:
    gm = two_negations()
    recorder = Recorder(gm, "mine")
    with pytest.raises(ZeroDivisionError, match="division by zero"), recorder:
        replace_neg(gm) or 1 / 0
    assert recorder.trace().stages[-1].error == "ZeroDivisionError: division by zero"


def test_a_recorder_that_no_pass_told_of_anything() -> None:
    with Recorder() as recorder, pytest.raises(OptionError, match="nothing was recorded"):
        recorder.trace()
    stage = Stage("start", Snapshot.of(two_negations()))
    assert Trace((stage,)).diff().is_empty


def test_tensors_are_not_kept() -> None:
    def value(make: Maker, x: fx.Node) -> fx.Node:
        return make.call(aten.neg.default, x, value=torch.ones(2, 3))

    trace = history(graph_module(value), merge_nothing)
    assert str(trace.stages[0].snapshot.nodes[1].values[0]) == "f32[2, 3]"
