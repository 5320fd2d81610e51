"""Reads FX graphs: every node of a module and of the graphs that it calls, as plain data."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx

from autodeploy.graph.location import module_path
from autodeploy.graph.meta import MODEL_NAME, MODULE_STACK, ROLE, STACK_TRACE
from autodeploy.viz.arguments import Argument, Arguments, plain_text, read_argument
from autodeploy.viz.content import Hashes
from autodeploy.viz.node import Node
from autodeploy.viz.values import read_values, value_leaves

IdOf = Callable[[fx.Node], int]
_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int)
_ITEM = re.compile(r"(?:\._(?:modules|parameters|buffers))?\[['\"]?([^]'\"]*)['\"]?\]")
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch.export writes this where there is none


def graphs_of(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """(path, module) of `gm` and of every graph that its nodes call or refer to, once each, callers first."""
    pending, seen = [("", gm)], {gm}
    for path, module in pending:
        yield path, module
        for node in module.graph.nodes:
            inner = _attribute(module, node)
            if isinstance(inner, fx.GraphModule) and inner not in seen:
                seen.add(inner)
                pending.append((f"{path}.{node.target}".lstrip("."), inner))


def read_nodes(gm: fx.GraphModule, id_of: IdOf, hashes: Hashes) -> Iterator[Node]:
    """Every node of `graphs_of(gm)`, in graph order."""
    for path, owner in graphs_of(gm):
        sizes: set[fx.Node] = set()
        for node in owner.graph.nodes:
            if _is_size(node, sizes):
                sizes.add(node)
            yield _read_node(node, path, owner, id_of, sizes, hashes)


def _is_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """A size, or Python arithmetic on nothing but sizes."""
    inputs = node.all_input_nodes
    if node.op == "call_function" and node.target in _SIZES:
        return True
    if node.target is getattr:
        return node.args[1] in ("shape", "device", "dtype", "ndim")
    is_python = getattr(node.target, "__module__", "") in ("_operator", "math", "torch")
    return node.op == "call_function" and is_python and bool(inputs) and all(arg in sizes for arg in inputs)


def _attribute(owner: fx.GraphModule, node: fx.Node) -> Any:
    """The module or tensor that `node` names, None where it names none or one that is gone."""
    if node.op not in ("call_module", "get_attr"):
        return None
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _read_node(
    node: fx.Node, graph: str, owner: fx.GraphModule, id_of: IdOf, sizes: set[fx.Node], hashes: Hashes
) -> Node:
    attribute = _attribute(owner, node)
    # What a weight is may have changed since somebody wrote down what it was.
    values = value_leaves(attribute) if isinstance(attribute, torch.Tensor) else read_values(node)
    path, kind = _module(node)
    return Node(
        id=id_of(node),
        name=node.name,
        op=node.op,
        target=_plain_path(MODEL_NAME.get(node, "")) or _target(node.target),
        arguments=_arguments(node, attribute, id_of),
        values=values,
        graph=graph,
        module=path,
        module_type=kind,
        source=_source(str(STACK_TRACE.get(node) or "")),
        role=_role(node, attribute),
        free=node in sizes or _is_free(node, sizes),
        content="" if isinstance(attribute, fx.GraphModule) else hashes.of(attribute),
    )


@cache
def _target(target: Any) -> str:
    if isinstance(target, str | torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    if name is None or isinstance(target, torch._ops.OperatorBase):
        return plain_text(target)
    module = getattr(target, "__module__", None) or "torch"
    text = f"{module.removeprefix('_')}.{name}"
    return text.replace("torch._C._nn.", "torch.nn.functional.").replace("torch._VariableFunctionsClass.", "torch.")


def _arguments(node: fx.Node, attribute: Any, id_of: IdOf) -> Arguments:
    names, defaults = _schema(node.target)
    found = {names[index] if index < len(names) else str(index): arg for index, arg in enumerate(node.args)}
    found |= node.kwargs
    read = {name: read_argument(arg, id_of) for name, arg in found.items()}
    if node.op == "call_module" and isinstance(attribute, torch.nn.Module):
        read["module"] = _describe(attribute)
    # By repr, because 1, 1.0 and True are equal in Python.
    return tuple((name, arg) for name, arg in read.items() if repr(arg) != defaults.get(name))


@cache
def _schema(target: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the arguments of an ATen or custom op, and the repr of their defaults."""
    if not isinstance(target, torch._ops.OpOverload):
        return (), {}
    arguments = target._schema.arguments
    defaults = {arg.name: arg.default_value for arg in arguments if arg.has_default_value()}
    return tuple(arg.name for arg in arguments), {key: repr(read_argument(item, id)) for key, item in defaults.items()}


def _describe(module: torch.nn.Module) -> Argument:
    if isinstance(module, fx.GraphModule) or any(True for _ in module.children()):
        return type(module).__name__
    return plain_text(module)


def _module(node: fx.Node) -> tuple[str, str]:
    """Path and class of the model's module that made `node`; for an attribute, the path of the module that owns it."""
    path = module_path(node)
    if node.op == "get_attr" and not path:
        return str(node.target).rpartition(".")[0], ""
    if not path or path == _NO_MODULE:
        return "", ""
    kind = list(MODULE_STACK.of(node).values())[-1][1]
    name = kind if isinstance(kind, str) else kind.__qualname__
    return _plain_path(path), name.rpartition(".")[2]


def _plain_path(path: str) -> str:
    """As the model names it: Dynamo writes `L['self'].layers[0]` and `L['self']._modules['layers']`."""
    if not path.startswith(("L[", "G[")):
        return path
    local, _, rest = path[2:].partition("]")
    plain = _ITEM.sub(r".\1", rest).strip(".")
    return plain or ("" if local == "'self'" else local.strip("'\""))


@cache
def _source(trace: str) -> str:
    """`modeling_llama.py:243 in forward: q = self.q_proj(x)` of the innermost frame outside torch."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    frames = [index for index, line in enumerate(lines) if line.startswith("File ")]
    if not frames:
        return ""
    last = [index for index in frames if "/torch/" not in lines[index]][-1:] or frames[-1:]
    place = [part.strip() for part in lines[last[0]].removeprefix("File ").split(",")]
    if len(place) != 3:
        return lines[last[0]]
    file = place[0].strip('"').replace("\\", "/").rpartition("/")[2]
    follows = lines[last[0] + 1] if last[0] + 1 < len(lines) else ""
    code = "" if follows.startswith("File ") else follows
    return f"{file}:{place[1].removeprefix('line ')} {place[2]}: {code}".rstrip(": ")


def _role(node: fx.Node, attribute: Any) -> str:
    if node.op == "get_attr" and isinstance(attribute, torch.Tensor):
        return "weight" if isinstance(attribute, torch.nn.Parameter) else "constant"
    return str(ROLE.get(node, ""))


def _is_free(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """Whether `node` moves no data: an input, an attribute, an element of a tuple, or a view."""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.target is operator.getitem:
        return all(arg in sizes for arg in node.all_input_nodes[1:])
    if isinstance(node.target, torch._ops.OpOverload):
        return _is_view(node.target)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    packet = getattr(torch.ops.aten, str(name), None) if node.op != "call_module" else None
    return packet is not None and _is_view(getattr(packet, packet.overloads()[0]))


@cache
def _is_view(op: torch._ops.OpOverload) -> bool:
    """By its schema: the result shares the memory of an argument that it does not write to."""
    infos = [result.alias_info for result in op._schema.returns]
    # A conversion is a view only where it does nothing.
    converts = op._schema.name in ("aten::to", "aten::contiguous")
    return bool(infos) and not converts and all(info is not None and not info.is_write for info in infos)
