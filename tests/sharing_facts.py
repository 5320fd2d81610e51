"""What one call really does, beside its result: which arguments it writes to, which its results share memory with,
whether it draws random numbers; and where `autodeploy.effects` and `aliasing` say less than that.

Each fact is read off one call in eager: a fact that the package denies is a defect, whatever the passes make of it.
"""

from __future__ import annotations

from typing import Any

import torch
from sharing_oracle import LOG, bytes_of
from sharing_program import Program, Ref, Step, add_node, execute, refs, spell
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from autodeploy.graph.aliasing import aliased, writes
from autodeploy.graph.effects import impurity


def lies_in(program: Program) -> list[str]:
    """What the package denies of the steps of a program, run on its first inputs. Raises what a step raises."""
    values, root = program.make_inputs(), program.root()
    found = []
    for step in program.steps:
        # The graphs of a higher-order op are its arguments: one node alone does not show them.
        if step.kind in ("function", "method") and not isinstance(step.target, HigherOrderOperator):
            found += [f"{spell(step)} {lie}" for lie in lies(step, values)]
        else:
            values.append(execute(step, values, root))
    return found


def lies(step: Step, values: list[Any]) -> list[str]:
    """What the package denies of this call of a function or a method, a step of a program whose places hold `values`.

    Raises what the call raises; the values are as the call leaves them, with its result behind them.
    """
    places = sorted({ref.place for ref in refs((step.args, step.kwargs)) if isinstance(values[ref.place], Tensor)})
    graph = fx.Graph()
    nodes: list[Any] = [graph.placeholder(f"v{place}") for place in range(len(values))]
    node = add_node(graph, step, nodes)
    graph.output(node)
    before = {place: _seen(values[place]) for place in places}
    random_state, num_logged = torch.get_rng_state(), len(LOG)
    with torch.no_grad():
        values.append(execute(step, values, None))
    found = []
    why_not = impurity(node)
    if why_not is None and (len(LOG) > num_logged or not torch.equal(random_state, torch.get_rng_state())):
        found.append("draws random numbers or has an effect")
    made = {_storage(leaf) for leaf in pytree.tree_leaves(values[-1]) if isinstance(leaf, Tensor) and leaf.numel()}
    written = {before[place][-1] for place in places if nodes[place] in writes(node)}
    shared = {before[place][-1] for place in places if nodes[place] in aliased(node)}
    for place in places:  # arguments may share memory with each other
        if _seen(values[place]) != before[place] and (before[place][-1] not in written or why_not is None):
            found.append(f"writes to {_where(step, place)}")
        if before[place][-1] in made and before[place][-1] not in shared:
            found.append(f"shares memory with {_where(step, place)}")
    return found


def _where(step: Step, place: int) -> str:
    for index, arg in enumerate(step.args):
        if Ref(place) in refs(arg):
            return f"argument {index}"
    return next(f"argument {name}" for name, arg in step.kwargs.items() if Ref(place) in refs(arg))


def _seen(tensor: Tensor) -> Any:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return tensor.layout, tuple(tensor.shape), _storage(tensor)
    dense = tensor.resolve_conj().resolve_neg().contiguous()
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), bytes_of(dense), _storage(tensor)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
