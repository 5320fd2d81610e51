"""Writes what docs/architecture.md takes from the code: the table of rooms, and graph text after each pass.

    python tests/write_architecture.py

The table is `ROOMS` of tests/test_house.py. The text under each title is that of the second layer of a tiny llama.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from test_house import ROOMS
from tiny_models import tiny
from torch import fx

import autodeploy as ad
from autodeploy.graph.meta import SITE
from autodeploy.metadata.field import is_field
from autodeploy.ops.kinds import kind_of

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
PASSES = ("canonicalize", "find_attention", "find_latent_attention", "nest_inputs", "gather_logits")
PASSES += ("insert_cached_attention", "share_metadata", "lower_fields", "lower_linear")
WIDTH, MOST_LINES = 110, 8


def write(page: str) -> str:
    """The page with its table and its graph text as the code has them now."""
    start, end = page.index("<!-- rooms -->\n"), page.index("\n<!-- end of rooms -->")
    page = page[:start] + "<!-- rooms -->\n" + table() + page[end:]
    for title, text in way().items():
        fence = rf'(```text title="{title}"\n)(?:.*?\n)??```'
        page, count = re.subn(fence, lambda found, text=text: f"{found[1]}{text}\n```", page, flags=re.DOTALL)
        assert count == 1, f"no block is titled {title}"
    return page


def table() -> str:
    rows = [
        f"| `{room}` | {meaning} | {imports.replace(' ', ', ') or '-'} |" for room, (meaning, imports) in ROOMS.items()
    ]
    return "\n".join(["| room | what it is | imports |", "|---|---|---|", *rows])


def way() -> dict[str, str]:
    """What the second attention of a tiny llama is after tracing and after each pass that changes it."""
    gm = ad.trace(tiny("llama", 2))
    after = {"trace": gm}
    for count, name in enumerate(PASSES, start=1):
        after[name] = ad.apply(gm, passes=PASSES[:count]).module
    shared, lowered = after["share_metadata"], after["lower_fields"]
    return {
        "trace": lines(attention(after["trace"])),
        "nest_inputs": lines(attention(after["nest_inputs"])),
        "gather_logits": lines(logits(after["gather_logits"])),
        "insert_cached_attention": lines(attention(after["insert_cached_attention"])),
        "share_metadata": lines([*calls(shared), *attention(shared)]),
        "inside prepare_metadata": lines([node for node in computed(shared.prepare_metadata) if is_field(node.target)]),
        "lower_fields": lines(computed(lowered.prepare_metadata)),
        "lower_linear": lines(list(linears(after["lower_linear"]))[:2]),
    }


def attention(gm: fx.GraphModule) -> list[fx.Node]:
    """The attention nodes of the layer, each with the fields that it reads."""
    nodes = [node for node in gm.graph.nodes if SITE.on(node) or kind_of(node.target)]
    chosen = nodes[len(nodes) // 2 :]
    fields = {arg for node in chosen for arg in node.all_input_nodes if is_field(arg.target)}
    return [node for node in gm.graph.nodes if node in fields or node in chosen]


def logits(gm: fx.GraphModule) -> list[fx.Node]:
    (indices,) = (node for node in gm.graph.nodes if "logits_indices" in str(node.target))
    return [indices, *indices.users]


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_module"))


def computed(gm: Any) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op in ("call_function", "call_method")]


def linears(gm: fx.GraphModule) -> Iterable[fx.Node]:
    return (node for node in gm.graph.nodes if "linear" in str(node.target) and node.op == "call_function")


def lines(nodes: list[fx.Node]) -> str:
    """One line for each node, the first few of many."""
    texts = [line(node) for node in nodes[:MOST_LINES]]
    more = len(nodes) - MOST_LINES
    return "\n".join([*texts, *([f"...  # and {more} more"] if more > 0 else [])])


def line(node: fx.Node) -> str:
    given = [*map(repr, node.args), *(f"{key}={value!r}" for key, value in node.kwargs.items())]
    text = f"{node.name} = {target(node)}({', '.join(given)})"
    return "\n".join(textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False))


def target(node: fx.Node) -> str:
    """The op as people write it: no `torch.ops`, no `.default`."""
    if isinstance(node.target, str):
        return f"self.{node.target}" if node.op == "call_module" else node.target
    return str(node.target).removesuffix(".default") if "." in str(node.target) else node.target.__name__


if __name__ == "__main__":
    PAGE.write_text(write(PAGE.read_text()))
