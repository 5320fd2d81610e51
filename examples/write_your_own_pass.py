"""A pass of your own: compute ahead what depends on weights alone.

Gemma's norms scale by `1.0 + weight`, so its graph adds 1 to every norm's weight in every step. Compilers leave it
there, because they take weights as inputs that may change. Here they do not, and the sums can be weights themselves:

Before:                                     After:
    w1 = add(to(weight, float32), 1.0)          y = mul(x, folded_0)
    y = mul(x, w1)

The same ops run on the same numbers, only earlier: not a bit changes, and `verify=True` checks that it is so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import autodeploy as ad
from autodeploy.extend import get_attribute, is_pure, record_values


@dataclass(frozen=True)
class FoldWeights:
    """Replace each value that follows from parameters alone by a parameter; matches the values replaced."""

    name: str = "fold_weights"

    def apply(self, gm: fx.GraphModule) -> int:
        values: dict[fx.Node, Any] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr" and isinstance(value := get_attribute(gm, node.target), nn.Parameter):
                values[node] = value
            elif node.op == "call_function" and is_pure(node) and values.keys() >= set(node.all_input_nodes) != set():
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs).detach()
        folded = [node for node in values if node.op != "get_attr" and not values.keys() >= node.users.keys()]
        for node in folded:
            self._replace(gm, node, values[node])
        return len(folded)

    def _replace(self, gm: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
        name = f"folded_{node.name}"
        gm.register_parameter(name, nn.Parameter(value, requires_grad=False))
        with gm.graph.inserting_before(node):
            weight = gm.graph.get_attr(name)
        record_values([weight])  # every node says what it makes
        node.replace_all_uses_with(weight)


def main() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    gm = ad.trace(AutoModelForCausalLM.from_config(config).eval())

    # The default list with one more pass in it; names stand for the default passes.
    passes = ["canonicalize", FoldWeights(), "find_attention", "nest_inputs", "gather_logits"]
    passes += ["insert_cached_attention", "share_metadata", "lower_fields"]
    result = ad.apply(gm, passes=passes, verify=True)
    print(result.report)


if __name__ == "__main__":
    main()
