"""What a traced graph is, as one hash: nodes, literals to the bit, the form of every tensor, which are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload

from autodeploy.graph.edit import get_attribute, is_same_tensor
from autodeploy.graph.meta import CONSTANT, MODULE_STACK, ROLE, VALUE
from autodeploy.graph.spelling import SYMBOLIC
from autodeploy.inductor.fingerprint import Fingerprint, NotHashable, is_installed, tensor_bytes

# Ops of these may be written out by Inductor: their code is torch's or ours. All others must be opaque.
_NAMESPACES = frozenset({"aten", "prims", "prim", "inductor", "autodeploy", "autodeploy_field"})
_WRITTEN_OUT = "CompositeImplicitAutograd"


def add_graph(fingerprint: Fingerprint, gm: fx.GraphModule, model: nn.Module) -> None:
    """Add `gm`, a trace of `model`. Raises NotHashable."""
    own = own_tensors(model)
    tensors: dict[str, Tensor] = {}
    _add_nodes(fingerprint, gm, "", tensors)
    fingerprint.add(len(tensors))
    add_forms(fingerprint, tensors)
    for name, tensor in tensors.items():
        is_own = is_same_tensor(own.get(name), tensor)
        fingerprint.add((name, None if is_own else tensor_bytes(tensor)))


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of `model`, under every name that they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def add_forms(fingerprint: Fingerprint, tensors: Mapping[str, Tensor]) -> None:
    """Add everything about `tensors` but their values, and which of them share memory."""
    owners: dict[int, int] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise NotHashable(f"{name} is a {type(tensor).__qualname__}")
        if tensor.layout is not torch.strided:
            raise NotHashable(f"{name} is stored as {tensor.layout}")
        owner = owners.setdefault(tensor.untyped_storage()._cdata, index)
        where = (owner, tensor.storage_offset(), tensor.untyped_storage().nbytes())
        flags = (tensor.requires_grad, type(tensor).__name__, tensor.is_conj(), tensor.is_neg())
        fingerprint.add((name, tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), where, flags))


def _add_nodes(fingerprint: Fingerprint, gm: fx.GraphModule, prefix: str, tensors: dict[str, Tensor]) -> None:
    places: dict[fx.Node, tuple[str, int]] = {}
    for index, node in enumerate(gm.graph.nodes):
        arguments: Any = fx.map_arg((node.args, node.kwargs), places.__getitem__)
        stack = [(path, str(kind)) for path, kind in (MODULE_STACK.get(node) or {}).values()]
        fingerprint.add((node.op, node.name, _target(node), stack, ROLE.get(node), CONSTANT.on(node)))
        fingerprint.add(_described(arguments))
        fingerprint.add(_described(VALUE.get(node)))
        fingerprint.add(sorted(_ranges(VALUE.get(node))))
        places[node] = ("node", index)
        if node.op == "get_attr":
            _add_attribute(fingerprint, get_attribute(gm, str(node.target)), prefix + str(node.target), tensors)
        elif node.op == "call_module":
            raise NotHashable(f"a call of the module {node.target}")


def _add_attribute(fingerprint: Fingerprint, value: Any, name: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, fx.GraphModule):
        _add_nodes(fingerprint, value, f"{name}.", tensors)
    elif isinstance(value, Tensor):
        tensors[name] = value
    else:
        raise NotHashable(f"{name} in the graph, of type {type(value).__qualname__}")


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload) and (target.namespace in _NAMESPACES or _is_opaque(target)):
        return f"{target} {target._schema}"
    if isinstance(target, HigherOrderOperator):
        return target.name()
    if not isinstance(target, OpOverload) and is_installed(target.__module__):
        return f"{target.__module__}.{getattr(target, '__qualname__', target)}"
    raise NotHashable(f"a call of {target}, whose code is not torch's")


def _is_opaque(op: OpOverload) -> bool:
    """Whether compiled code calls `op` as it is when it runs, rather than what it was."""
    return not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), _WRITTEN_OUT)


def _described(value: Any) -> Any:
    """`value` with fake tensors and symbols in words."""
    if isinstance(value, Tensor):
        sizes = ([str(size) for size in value.shape], [str(stride) for stride in value.stride()])
        return ("tensor", value.dtype, value.device, *sizes, str(value.storage_offset()), value.requires_grad)
    if isinstance(value, SYMBOLIC):
        return (type(value).__name__, str(value.node.expr))
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(_described, value)]
    if isinstance(value, slice):
        return ("slice", _described([value.start, value.stop, value.step]))
    return value


def _ranges(value: Any) -> Iterator[str]:
    """What is known of the symbols in the sizes of a value."""
    sizes = value.shape if isinstance(value, Tensor) else [value]
    for size in sizes:
        if isinstance(size, torch.SymInt):
            for symbol in size.node.expr.free_symbols:
                yield f"{symbol}: {size.node.shape_env.var_to_range.get(symbol)}"
