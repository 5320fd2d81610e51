"""Every key of `meta` that this package reads or writes, of nodes and of graphs: ours, and those of torch's tracers.

No other file knows one. `Key` types what stands behind a name that FX itself leaves untyped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import fx

T = TypeVar("T")
D = TypeVar("D")
Holder = fx.Node | fx.GraphModule


@dataclass(frozen=True)
class Key(Generic[T]):
    """One entry of the `meta` of nodes or graphs, by name."""

    name: str

    def of(self, holder: Holder) -> T:
        """The entry; raises KeyError where there is none."""
        return holder.meta[self.name]

    def get(self, holder: Holder, default: D = None) -> T | D:
        """The entry, or `default`."""
        return holder.meta.get(self.name, default)

    def on(self, holder: Holder) -> bool:
        """Whether there is an entry."""
        return self.name in holder.meta

    def set(self, holder: Holder, value: T) -> None:
        holder.meta[self.name] = value

    def take(self, holder: Holder, default: D = None) -> T | D:
        """The entry, which goes, or `default`."""
        return holder.meta.pop(self.name, default)


# What tracers leave on nodes: export and make_fx a fake value, Dynamo another, from which modules and which source.
VALUE = Key[Any]("val")
EXAMPLE_VALUE = Key[Any]("example_value")
TENSOR_META = Key[Any]("tensor_meta")  # of ShapeProp
MODULE_STACK = Key[dict[str, tuple[str, Any]]]("nn_module_stack")
STACK_TRACE = Key[str]("stack_trace")
UNBACKED_BINDINGS = Key[dict[Any, Any]]("unbacked_bindings")
# What Dynamo and AOTAutograd say of inputs.
GRAPH_ARGUMENT = Key[Any]("grapharg")
TENSOR_DICT = Key[dict[str, Any]]("tensor_dict")
DESCRIPTION = Key[Any]("desc")

# Of inputs: what the model calls them, where a graph has lost it.
MODEL_NAME = Key[str]("autodeploy_model_name")
# Of inputs: "layout", "constant", "tokens", "cache" or "weight".
ROLE = Key[str]("autodeploy_role")
# Of get_attr nodes: tracing made this tensor, it is nobody's to change.
CONSTANT = Key[bool]("autodeploy_constant")
# Of canonical attention nodes: that find_attention has counted them, and the words of the forms it found them in.
CANONICAL = Key[bool]("autodeploy_canonical")
FORM = Key[tuple[str, ...]]("autodeploy_form")
# Of cached attention nodes: the Site they came from.
SITE = Key[Any]("autodeploy_site")
# Of a layout-only node that stays where it is: why.
KEPT = Key[str]("autodeploy_kept")
# Of a node that a pass left alone: why; and of a graph: the nodes that were, and why, since somebody took them.
NEAR_MISS = Key[str]("autodeploy_near_miss")
NEAR_MISSES = Key[list[tuple[fx.Node, str]]]("autodeploy_near_misses")
# Of every node of a watched graph: its number, as of the end of the last pass.
NODE_ID = Key[int]("autodeploy_node_id")

# Of a graph: how many positions its model is made for, if it says so; how long tracing took.
NUM_POSITIONS = Key[int]("autodeploy_num_positions")
TRACE_SECONDS = Key[float]("autodeploy_trace_seconds")
# Of a graph: names of the tensors whose values decided what it became.
LOOKED_AT = Key[frozenset[str]]("autodeploy_looked_at")
# Of a graph with caches: its LayoutSpec, and its caches in the order of its inputs.
LAYOUT_SPEC = Key[Any]("autodeploy_layout_spec")
CACHE_SPECS = Key[tuple[Any, ...]]("autodeploy_cache_specs")


def origin(node: fx.Node) -> dict[str, Any]:
    """`meta` for a node that stands for `node` or a part of it: the same module, the same line of source."""
    return {key.name: key.of(node) for key in (MODULE_STACK, STACK_TRACE) if key.on(node)}
