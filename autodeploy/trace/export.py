"""`trace(model)`: torch.export of a transformers causal LM, with what layers ask of attention kept as canonical nodes.

Before: `model.forward(input_ids, attention_mask, position_ids, past_key_values, ...)`, Python.
After:  `gm(input_ids [B, S] int64, position_ids [B, S] int64) -> logits [B, S, V]`, ATen plus one canonical node, such
as `autodeploy::attention`, for whatever mixes the tokens of a layer; weights are the model's own.
"""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from autodeploy.attention_forms.find import find, needs_finding
from autodeploy.errors import AutodeployError, TraceError, UnsupportedFeature
from autodeploy.graph.aliasing import storages
from autodeploy.graph.canonical import canonicalize
from autodeploy.graph.edit import take_near_misses
from autodeploy.graph.effects import is_needed
from autodeploy.graph.equality import mark_constants
from autodeploy.graph.meta import NUM_POSITIONS, TRACE_SECONDS, VALUE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Any two sizes above one that differ: they become symbols.
_EXAMPLE_SHAPE = (2, 12)
_MOST_TOKENS = 2**31 - 1  # layouts count in int32
# How configs call the number of positions that their model is made for.
_NUM_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_LOAD_WITH = "load it with transformers.AutoModelForCausalLM.from_pretrained"


def trace(model: PreTrainedModel) -> fx.GraphModule:
    """The graph of `model`, which is left as found and shares its parameters and buffers with the result.

    Placeholders are `input_ids` and, where the model's forward takes them, `position_ids`, both [B, S] int64 with
    every B and S allowed; the only output is the logits [B, S, V]. A batch row is one sequence without padding.
    Raises TraceError, NoAttentionFound, or UnsupportedFeature with the layer's module path.
    """
    # transformers takes a second to import, which torch.compile does without.
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TraceError(f"{type(model).__name__} is not a transformers model", fix=_LOAD_WITH)
    if model.config.is_encoder_decoder:
        raise UnsupportedFeature("an encoder-decoder model", where=type(model).__name__, fix="use a decoder-only model")
    start = time.perf_counter()
    program = _export(model)
    _check_dynamic(program, model)
    gm = _plain(program, model)
    if most := num_positions(model):
        NUM_POSITIONS.set(gm, most)
    if needs_finding(gm):
        canonicalize(gm)
    find(gm, where=type(model).__name__)
    take_near_misses(gm)  # they stay on their nodes
    gm.graph.eliminate_dead_code(is_needed)
    gm.recompile()
    TRACE_SECONDS.set(gm, time.perf_counter() - start)
    return gm


def num_positions(model: PreTrainedModel) -> int | None:
    """The most tokens of a sequence, as far as the config of `model` says."""
    config = model.config.get_text_config()
    return next((most for name in _NUM_POSITIONS if (most := getattr(config, name, None))), None)


def _export(model: PreTrainedModel) -> ExportedProgram:
    inputs = {"input_ids": torch.zeros(_EXAMPLE_SHAPE, dtype=torch.int64, device=model.device)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = torch.arange(_EXAMPLE_SHAPE[1], device=model.device)
        inputs["position_ids"] = positions.expand(_EXAMPLE_SHAPE).contiguous()
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    from autodeploy.trace.patches import traceable

    with traceable(model), torch.no_grad():
        try:
            return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        except AutodeployError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise TraceError(
                f"torch.export failed: {type(error).__name__}: {reason[0]}",
                where=type(model).__name__,
                fix="the chained exception has the model's source line",
            ) from error


def _check_dynamic(program: ExportedProgram, model: PreTrainedModel) -> None:
    """Refuse a graph that is right for some sizes only, where the model is made for others: it branched on a size.

    Tables of positions end where the model does.
    """
    names = program.graph_signature.user_inputs
    inputs = [VALUE.of(node) for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    sizes = [value.shape[1] for value in inputs if isinstance(value, Tensor)]
    lengths = {size.node.expr for size in sizes if isinstance(size, torch.SymInt)}
    for symbol, bounds in program.range_constraints.items():
        longest = (symbol in lengths and num_positions(model)) or _MOST_TOKENS
        if symbol.name.startswith("s") and (bounds.lower > 2 or bounds.upper < longest):
            raise TraceError(
                f"the graph holds for sizes {bounds.lower} to {bounds.upper} only", where=type(model).__name__
            )


def _plain(program: ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """One output and ordinary code: no pytrees, no guards."""
    exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    graph = exported.graph
    output = graph.output_node()
    output.args = (_logits(output, program, model),)
    graph.set_codegen(CodeGen())
    graph.eliminate_dead_code()
    gm = fx.GraphModule(exported, graph)
    mark_constants(gm, set(storages(model)))
    return gm


def _logits(output: fx.Node, program: ExportedProgram, model: nn.Module) -> fx.Node:
    leaves, spec = output.args[0], program.call_spec.out_spec
    assert isinstance(leaves, (tuple, list))
    assert spec is not None
    logits = getattr(pytree.tree_unflatten(list(leaves), spec), "logits", None)
    if not isinstance(logits, fx.Node) or VALUE.of(logits).ndim != 3:
        raise TraceError(f"{type(model).__name__} does not return logits for every token", fix=_LOAD_WITH)
    return logits
