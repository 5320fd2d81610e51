"""Merging by meaning: what is another way of writing a form becomes the form, or the field that it is.

Before:                                          After:
    cu = pad(cumsum(layout[:, 0]), (1, 0))           cu = cu_seqlens_q(layout)
    s = layout[:, 1] + diff(cu)                      last = last_page_len(layout, 16)
    last = where(s % 16 == 0, 16, s % 16)

Nodes are read in graph order, so that a rule meets operands that are known already and looks no deeper than its own
pattern. Every rule is exact to the bit in all dtypes that it accepts: what holds modulo 2^n holds for any integer
tensor; what fails where a sum overflows is done for lengths alone, as a layout counts tokens and pages in int32.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import fx

from autodeploy.graph import near_miss
from autodeploy.metadata.forms.calls import Call, read
from autodeploy.metadata.forms.normal import write
from autodeploy.metadata.forms.pages import CeilDiv, LastPageLen, NegatedFloorDiv
from autodeploy.metadata.forms.rows import TokenRow
from autodeploy.metadata.forms.sums import Column, ContextLens, Diff, Offset, PrefixSum, RunningSum, SeqLens
from autodeploy.metadata.forms.values import Values, holds_no_integers


class Rule(Protocol):
    """One identity, with its proof and domain in the docstring.

    `roots` are the ops that its pattern may end in. `match` gives the form that a node looks like, or None; in `call`,
    what the node computes, equal operands are equal objects. `check` says why the node may not be taken for it, or
    None.
    """

    roots: ClassVar[tuple[str, ...]]

    def match(self, values: Values, node: fx.Node, call: Call) -> Call | None: ...

    def check(self, values: Values, node: fx.Node, form: Call) -> str | None: ...


RULES: tuple[Rule, ...] = (
    Column(),
    SeqLens(),
    ContextLens(),
    Diff(),
    RunningSum(),
    PrefixSum(),
    LastPageLen(),
    CeilDiv(),
    NegatedFloorDiv(),
    TokenRow(),
    Offset(),
)
_BY_ROOT: dict[str, list[Rule]] = {}
for _rule in RULES:
    for _root in _rule.roots:
        _BY_ROOT.setdefault(_root, []).append(_rule)


def rewrite_equal_forms(graph: fx.Graph, known: set[fx.Node]) -> int:
    """Write every form among the layout-only nodes `known` in its one normal way; returns how many were rewritten.

    `known` is kept up to date. What a rule matches and may not rewrite is a near miss. Applied again, it returns 0.
    """
    values = Values(graph)
    replaced = []
    for node in graph.nodes:
        if node not in known or holds_no_integers(node):
            continue
        call = read(node)
        if call is not None and _normalise(values, node, call, known):
            replaced.append(node)
    _erase_unused(graph, replaced, known)
    return len(replaced)


def _normalise(values: Values, node: fx.Node, call: Call, known: set[fx.Node]) -> bool:
    """Learn what `node` computes; whether another node took its place."""
    call = Call(call.op, tuple([values.operand(arg) for arg in call.args]))
    values.infer(node, call)
    if values.is_identity(node, call):
        values.equate(node, call.args[0])
        return False
    form = _form(values, node, call)
    if form is None:
        values.learn(node, call)
        return False
    previous = node.prev
    normal = write(values, node, form)
    if form.op == "same":
        values.equate(node, form.args[0])
    else:
        values.learn(normal, form)
    if normal is node:
        return False
    made = node.prev
    while made is not previous:
        known.add(made)
        made = made.prev
    node.replace_all_uses_with(normal)
    return True


def _form(values: Values, node: fx.Node, call: Call) -> Call | None:
    """The form that `node` is, as the first rule says that matches and has nothing against it."""
    for rule in _BY_ROOT.get(call.op, ()):
        form = rule.match(values, node, call)
        if form is None:
            continue
        reason = rule.check(values, node, form)
        if reason is None:
            return form
        if node.graph.owning_module is not None:
            near_miss(node.graph.owning_module, node, reason)
    return None


def _erase_unused(graph: fx.Graph, replaced: list[fx.Node], known: set[fx.Node]) -> None:
    """Erase what was replaced, and what was computed for that alone."""
    unused = list(replaced)
    while unused:
        node = unused.pop()
        if node.users or node.op == "placeholder" or node not in known:
            continue
        unused += node.all_input_nodes
        graph.erase_node(node)
        known.discard(node)
