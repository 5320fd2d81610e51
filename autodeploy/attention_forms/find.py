"""Attention that a model wrote itself becomes canonical: `find` asks every softmax, SDPA and flex_attention of a graph.

Before:                                             After:
    scores = matmul(q, transpose(k, 2, 3)) * 0.125      attn = autodeploy.attention(q, k, v, scale=0.125,
    weights = softmax(where(mask, scores, -3e38))           causal=True).transpose(1, 2)
    attn = matmul(weights, v)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autodeploy.attention_forms import indexer
from autodeploy.attention_forms.asked import Masks, Sizes
from autodeploy.attention_forms.check import check
from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.flex import FLEX, WrittenOut, erase_idle_lists, learn_without_flex, why_not, write_out
from autodeploy.attention_forms.match import Matcher, is_fused, is_sdpa
from autodeploy.attention_forms.opaque import may_be_attention
from autodeploy.attention_forms.rewrite import rewrite, with_constants
from autodeploy.attention_forms.softmaxes import is_softmax
from autodeploy.errors import NoAttentionFound
from autodeploy.graph.edit import near_miss, record, take_near_misses
from autodeploy.graph.in_place import out_of_place
from autodeploy.graph.location import node_location
from autodeploy.graph.meta import VALUE
from autodeploy.graph.values import replace_node, retype
from autodeploy.ops.kind import Kind
from autodeploy.ops.kinds import kind_of, kinds

_MOST_LISTED = 8  # near misses in one message


@dataclass(frozen=True)
class _Heart:
    """The softmax or SDPA in the middle of an attention, and the `node` that a reader knows it by."""

    node: fx.Node
    softmax: fx.Node
    written: WrittenOut | None = None


def find(gm: fx.GraphModule, *, where: str = "") -> list[fx.Node]:
    """Make canonical what has a canonical form; returns all canonical nodes, those that were there already included.

    What came near is a near miss of `gm`, with the reason; what only the old form used is left to dead code
    elimination. Raises NoAttentionFound with the near misses, and with `where`, for a graph without a canonical node.
    """
    if needs_finding(gm):
        out_of_place(gm)
    hearts = _hearts(gm)
    matcher = Matcher(gm, learn_without_flex(gm)) if hearts else None
    stale: list[fx.Node] = []
    for heart in hearts:
        assert matcher is not None
        reason = _reduce(gm, heart, matcher, stale)
        if reason is not None:
            near_miss(gm, heart.node, reason)
    retype(gm.graph, stale)
    for kind in kinds():
        _recognize(gm, kind)
    _find_indexers(gm)
    asked = {heart.node for heart in hearts}
    for node in gm.graph.nodes:
        if node in asked or is_fused(node) or not may_be_attention(node):
            continue
        near_miss(gm, node, f"may be an attention: {node.target} takes three tensors, and is not known")
    canonical = [node for node in gm.graph.nodes if kind_of(node.target) is not None]
    if not canonical:
        raise _no_attention(gm, where or type(gm).__name__)
    if any(heart.written for heart in hearts):
        erase_idle_lists(gm)
    return canonical


def _recognize(gm: fx.GraphModule, kind: Kind) -> None:
    """Make canonical what the model wrote itself of `kind`; what only came near is a near miss."""
    for node in [node for op in kind.near for node in gm.graph.find_nodes(op="call_function", target=op) if node.users]:
        written = kind.recognize(node)
        if isinstance(written, str):
            near_miss(gm, node, written)
        elif written is not None:
            inputs = with_constants(written.output, written.inputs, kind.name)
            new = record(written.output, written.canonical, *inputs)
            retype(gm.graph, replace_node(written.output, new))


def _find_indexers(gm: fx.GraphModule) -> None:
    """Make canonical what chooses among tokens."""
    nodes = [
        node for node in gm.graph.find_nodes(op="call_function", target=indexer.TOPK) if indexer.is_of_tokens(node)
    ]
    sizes = Sizes(gm)
    masks = Masks(gm, learn_without_flex(gm).known, sizes) if nodes else None
    for node in nodes:
        assert masks is not None
        try:
            found = indexer.read_indexer(gm, node, masks, sizes)
        except Refused as refused:
            near_miss(gm, node, str(refused))
        else:
            retype(gm.graph, indexer.rewrite(found))


def needs_finding(gm: fx.GraphModule) -> bool:
    """Whether anything in `gm` may be attention that is not canonical yet; a softmax of matrices routes to experts."""
    hearts = (node for node in gm.graph.nodes if _is_heart(node))
    return any(getattr(VALUE.get(heart), "ndim", 0) > 2 for heart in hearts) or bool(_flexes(gm))


def _flexes(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is FLEX]


def _is_heart(node: fx.Node) -> bool:
    return is_sdpa(node) or is_softmax(node)


def _hearts(gm: fx.GraphModule) -> list[_Heart]:
    """All of `gm` in order, those of flex_attention last and written out in front of it."""
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    hearts = [_Heart(node, node) for node in nodes if _is_heart(node)]
    for node in _flexes(gm):
        reason = why_not(gm, node)
        if reason is not None:
            near_miss(gm, node, reason)
            continue
        written = write_out(gm, node)
        hearts.append(_Heart(node, written.softmax, written))
    return hearts


def _reduce(gm: fx.GraphModule, heart: _Heart, matcher: Matcher, stale: list[fx.Node]) -> str | None:
    """Make the attention around `heart` canonical, or say why not; None as well where it is no attention.

    Adds to `stale` the nodes whose values are to be made again.
    """
    reason = None
    try:
        found = matcher.match(heart.softmax, hides_rows=heart.written is not None)
        reason = check(gm, found, matcher.sizes) if found else None
    except Refused as refused:
        found, reason = None, str(refused)
    if found and reason is None:
        stale += rewrite(found, heart.written.output if heart.written else found.output)
    if heart.written:
        heart.written.erase()
    if heart.written and found and reason is None:
        heart.written.erase_flex()
    return reason


def _no_attention(gm: fx.GraphModule, where: str) -> NoAttentionFound:
    """The error for a graph without a canonical node, with the near misses in it."""
    misses = [f"{node_location(node)}: {reason}" for node, reason in take_near_misses(gm)]
    more = [f"and {len(misses) - _MOST_LISTED} more"] if len(misses) > _MOST_LISTED else []
    listed = "; ".join([*misses[:_MOST_LISTED], *more])
    near = f"; near misses: {listed}" if misses else "; nothing in it mixes tokens in a way we know"
    return NoAttentionFound(
        f"no attention node found in a graph of {len(gm.graph.nodes)} nodes{near}",
        where=where,
        fix="docs/attention_forms.md lists the forms that are known",
    )
