"""The runner and `apply`: what is recorded, what is checked after each pass, and what verification catches."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from layout_graphs import call, module
from tiny_models import MODEL_TYPES, tiny, tokens
from torch import fx
from traces import text, traced

import autodeploy as ad
from autodeploy.compiler import pipeline
from autodeploy.compiler.pipeline import NearMiss, PassRecord
from autodeploy.compiler.report import Report
from autodeploy.errors import InvariantError, OptionError, PassError, UnknownName, UnsupportedFeature
from autodeploy.graph.edit import PREPARE, Pass, near_miss, placeholders, prepare_nodes
from passes import Canonicalize, ShareMetadata, default

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """A pass that runs `rewrite` and claims one match."""

    rewrite: Callable[[fx.GraphModule], object]
    name: str = "step"

    def apply(self, gm: fx.GraphModule) -> int:
        self.rewrite(gm)
        return 1


@dataclass
class Observer:
    seen: list[object] = field(default_factory=list)

    def before(self, step: Pass, gm: fx.GraphModule) -> None:
        self.seen.append(("before", step.name, len(gm.graph.nodes)))

    def after(self, step: Pass, gm: fx.GraphModule, record: PassRecord) -> None:
        self.seen.append(("after", step.name, record.after.nodes, len(gm.graph.nodes)))


def small() -> fx.GraphModule:
    return module(lambda graph, layout, x: call(aten.add.Tensor, x, call(aten.neg.default, layout)))


def shared() -> fx.GraphModule:
    gm = small()
    pipeline.run(gm, [ShareMetadata()])
    return gm


def insert_before_output(gm: fx.GraphModule, *targets: Callable[..., object]) -> None:
    """A chain of unary ops on the first output."""
    output = gm.graph.output_node()
    value = output.all_input_nodes[0]
    with gm.graph.inserting_before(output):
        for target in targets:
            value = gm.graph.call_function(target, (value,))
    output.replace_input_with(output.all_input_nodes[0], value)


def test_a_record_says_what_a_pass_did() -> None:
    def rewrite(gm: fx.GraphModule) -> None:
        insert_before_output(gm, aten.neg.default, aten.abs.default)
        near_miss(gm, gm.graph.output_node(), "is the output")
        gm.graph.create_node("call_function", aten.neg.default, (placeholders(gm)[0],))  # dead

    (record,) = pipeline.run(small(), [Step(rewrite)])
    assert (record.name, record.matches) == ("step", 1)
    assert record.near_misses == (NearMiss("node output", "is the output"),)
    assert record.after.nodes == record.before.nodes + 2
    assert (record.after.metadata_nodes, record.after.metadata_ops, record.after.prepare_calls) == (1, 1, 0)
    assert record.options.startswith("Step(rewrite=")
    assert record.seconds >= 0


def test_a_pass_without_matches_is_recorded_too() -> None:
    records = pipeline.run(shared(), [ShareMetadata()])
    assert [(record.matches, record.before) for record in records] == [(0, records[0].after)]


def test_a_typed_error_keeps_its_type_and_names_the_pass() -> None:
    def rewrite(gm: fx.GraphModule) -> None:
        raise UnsupportedFeature("too strange")

    with pytest.raises(UnsupportedFeature, match="too strange") as caught:
        pipeline.run(small(), [Step(rewrite, name="picky")])
    assert caught.value.__notes__ == ["  pass:  picky"]


def test_any_other_error_becomes_a_pass_error() -> None:
    with pytest.raises(PassError, match="pass 'clumsy' failed: ZeroDivisionError") as caught:
        pipeline.run(small(), [Step(lambda gm: 1 // 0, name="clumsy")])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def _duplicate(gm: fx.GraphModule) -> None:
    (prepare,) = prepare_nodes(gm)
    with gm.graph.inserting_after(prepare):
        again = gm.graph.call_module(PREPARE, prepare.args)
    next(iter(prepare.users)).args = (again, 0)
    with gm.graph.inserting_after(again):
        item = gm.graph.call_function(operator.getitem, (prepare, 0))
    output = gm.graph.output_node()
    output.args = ((output.args[0], item),)


def _leave_outside(gm: fx.GraphModule) -> None:
    output, layout = gm.graph.output_node(), placeholders(gm)[1]
    with gm.graph.inserting_before(output):
        late = gm.graph.call_function(aten.cos.default, (layout,))
    output.args = ((output.args[0], late),)


def _move_in_front(gm: fx.GraphModule) -> None:
    (prepare,) = prepare_nodes(gm)
    with gm.graph.inserting_before(prepare):
        early = gm.graph.call_function(aten.sin.default, (placeholders(gm)[0],))
    output = gm.graph.output_node()
    output.args = ((output.args[0], early),)


def _break_order(gm: fx.GraphModule) -> None:
    node = gm.graph.output_node().all_input_nodes[0]
    placeholders(gm)[-1].append(node)


@pytest.mark.parametrize(
    ("rewrite", "message", "node"),
    [
        (_duplicate, "2 prepare_metadata nodes instead of one", "prepare_metadata"),
        (_leave_outside, "1 layout-only nodes outside prepare_metadata, such as %cos", "cos"),
        (_move_in_front, "prepare_metadata does not come right after the inputs", "sin"),
        (_break_order, "the graph is not valid: .*used before it has been defined", ""),
    ],
)
def test_a_broken_invariant_names_the_node_and_the_pass(
    rewrite: Callable[[fx.GraphModule], None], message: str, node: str
) -> None:
    with pytest.raises(InvariantError, match=message) as caught:
        pipeline.run(shared(), [Canonicalize(), Step(rewrite, name="vandal")])
    assert node in caught.value.where
    assert caught.value.__notes__ == ["  pass:  vandal"]


def test_observers_see_each_pass() -> None:
    observer, gm = Observer(), small()
    count = len(gm.graph.nodes)
    pipeline.run(gm, [Step(lambda gm: insert_before_output(gm, aten.neg.default)), ShareMetadata()], [observer])
    assert observer.seen[:3] == [
        ("before", "step", count),
        ("after", "step", count + 1, count + 1),
        ("before", "share_metadata", count + 1),
    ]
    assert observer.seen[3][:2] == ("after", "share_metadata")  # type: ignore[index]


def test_apply_leaves_its_input_alone_and_shares_weights() -> None:
    gm = traced("llama")
    graph, meta = text(gm), dict(gm.meta)
    result = ad.apply(gm)
    assert (text(gm), gm.meta) == (graph, meta)
    weights = {name: weight.data_ptr() for name, weight in gm.named_parameters(remove_duplicate=False)}
    kept = {name: weight.data_ptr() for name, weight in result.module.named_parameters(remove_duplicate=False)}
    assert kept
    assert kept.items() <= weights.items()
    assert text(ad.apply(gm).module) == text(result.module)


def test_unknown_names_list_the_known_ones() -> None:
    gm = traced("llama")
    with pytest.raises(UnknownName, match="unknown pass 'shared_metadata'") as caught:
        ad.apply(gm, passes=["canonicalize", "shared_metadata"])
    assert "did you mean 'share_metadata'? known: canonicalize, find_attention" in caught.value.fix
    with pytest.raises(UnknownName, match="unknown backend 'fast'") as caught:
        ad.apply(gm, backend="fast")
    assert "known: auto, " in caught.value.fix
    with pytest.raises(OptionError, match="neither a pass nor the name of one"):
        ad.apply(gm, passes=[3])  # type: ignore[list-item]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_default_pipeline_verifies(model_type: str) -> None:
    result = ad.apply(traced(model_type), verify=True)
    assert len(prepare_nodes(result.module)) == result.report.ledger.prepare_calls == 1
    assert [record.name for record in result.report.passes] == [step.name for step in default()]
    idle = {record.name for record in result.report.passes if not record.matches}
    assert idle == (set() if model_type == "deepseek_v3" else {"find_latent_attention"})


def _change_scale(gm: fx.GraphModule) -> None:
    node = gm.graph.find_nodes(op="call_function", target=torch.ops.autodeploy.attention.default)[-1]
    node.kwargs = {**node.kwargs, "scale": 1.01 * node.kwargs["scale"]}


def _drop_mask(gm: fx.GraphModule) -> None:
    node = gm.graph.find_nodes(op="call_function", target=torch.ops.autodeploy.attention.default)[-1]
    node.kwargs = {**node.kwargs, "cu_seqlens": None}


def _swap_outputs(gm: fx.GraphModule) -> None:
    """Cosine for sine: the first two outputs of prepare_metadata."""
    cosine, sine = sorted(prepare_nodes(gm)[0].users, key=lambda node: node.args[1])[:2]
    cosine.args, sine.args = sine.args, cosine.args


@pytest.mark.parametrize(
    ("rewrite", "after"),
    [(_change_scale, "find_attention"), (_drop_mask, "gather_logits"), (_swap_outputs, "share_metadata")],
)
def test_verification_names_the_wrong_pass(rewrite: Callable[[fx.GraphModule], None], after: str) -> None:
    steps = default()
    place = 1 + [step.name for step in steps].index(after)
    steps.insert(place, Step(rewrite, name="wrong"))
    with pytest.raises(PassError, match=r"pass 'wrong' changed the logits of random batch 0: off by"):
        ad.apply(traced("llama"), passes=steps, verify=True)


def test_the_report_reads_well_and_survives_json() -> None:
    report = ad.apply(traced("gemma3_text")).report
    lines = str(report).splitlines()
    names = [step.name for step in default()]
    assert [line.split()[0] for line in lines[2 : 2 + len(names)]] == names
    assert any(line.startswith("prepare_metadata nodes") and line.endswith(" 1") for line in lines)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert str(replace(report, notes=("a note",))).endswith("a note")
    assert report.seconds == sum(record.seconds for record in report.passes)


def test_metadata_does_not_grow_with_layers() -> None:
    few, many = (ad.apply(traced("gemma3_text", num_layers)).report.ledger for num_layers in (4, 40))
    assert (few.attention_nodes, many.attention_nodes) == (4, 40)
    assert (few.nodes_shared, few.ops_shared) == (many.nodes_shared, many.ops_shared)
    assert many.nodes_naive > 5 * few.nodes_naive
    assert many.ops_naive > 5 * few.ops_naive
    assert few.prepare_calls == many.prepare_calls == 1


def _forget_readers(gm: fx.GraphModule) -> None:
    next(iter(gm.graph.nodes)).users.clear()


def test_a_graph_whose_nodes_do_not_know_their_readers_is_no_graph() -> None:
    with pytest.raises(InvariantError, match="does not know that"):
        pipeline.run(small(), [Step(_forget_readers)])


def test_a_pass_says_how_much_it_matched() -> None:
    step = Step(lambda gm: None)
    object.__setattr__(step, "apply", lambda gm: None)
    with pytest.raises(PassError, match="returned None"):
        pipeline.run(small(), [step])


@pytest.mark.parametrize("verify", [False, True])
def test_an_exported_module_goes_in_as_it_is(verify: bool) -> None:
    """Its inputs have names and it returns what the model does; what comes out takes tensors and gives logits."""
    dims = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in ("input_ids", "position_ids")}
    shapes = {**dims, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            tiny("llama"), (), {**tokens(3, 12), "use_cache": False}, dynamic_shapes=shapes, strict=False
        )
    module = ad.apply(program.module(check_guards=False), verify=verify).module  # type: ignore[arg-type]
    assert len(placeholders(module)) == 2 + 2 * 4
    assert isinstance(module.graph.output_node().args[0], fx.Node)


@pytest.mark.parametrize("wrong", [None, torch.nn.Linear(1, 1), "graph"])
def test_what_is_no_graph_is_refused(wrong: Any) -> None:
    for call_it in (lambda: ad.apply(wrong), lambda: ad.diff(small(), wrong)):
        with pytest.raises(OptionError, match="is no FX graph"):
            call_it()
