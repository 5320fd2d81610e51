"""The ways in which a program becomes a graph. Each gives a graph that takes the program's inputs as they are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from sharing_oracle import tensors_of
from sharing_program import Program, Ref, Step, add_node, build, named, refs, resolve
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from autodeploy.compiler import pipeline
from autodeploy.graph.aliasing import storages
from autodeploy.graph.equality import mark_constants
from autodeploy.graph.meta import ROLE
from passes import ShareMetadata


def traced(program: Program, root: nn.Module) -> nn.Module:
    """A module whose `forward` is the program as plain code, as tracers want it."""
    text, scope = code(program)
    exec(text, scope)
    module = type("Program", (nn.Module,), {"forward": scope["forward"]})()
    module.root = root
    return module


def code(program: Program) -> tuple[str, dict[str, Any]]:
    """The text of a function `forward`, and the names that it uses."""
    scope: dict[str, Any] = {}
    lines = [f"def forward(self, {', '.join(f'v{place}' for place in range(len(program.inputs)))}):"]
    for place, step in enumerate(program.steps, len(program.inputs)):
        args = [_literal(arg, scope) for arg in step.args]
        args += [f"{name}={_literal(arg, scope)}" for name, arg in step.kwargs.items()]
        if step.kind == "function":
            scope[f"f{place}"] = step.target
            value = f"f{place}({', '.join(args)})"
        elif step.kind == "method":
            value = f"{args[0]}.{step.target}({', '.join(args[1:])})"
        else:
            value = f"self.root.{step.target}" + (f"({', '.join(args)})" if step.kind == "module" else "")
        lines.append(f"    v{place} = {value}")
    lines.append(f"    return {_literal(program.outputs, scope)}")
    return "\n".join(lines), scope


def _literal(value: Any, scope: dict[str, Any]) -> str:
    """`value` as code; what has no text of its own becomes a name in `scope`."""
    kind = type(value)
    if kind is Ref:
        return f"v{value.place}"
    if kind in (tuple, list):
        inner = "".join(f"{_literal(item, scope)}, " for item in value)
        return f"({inner})" if kind is tuple else f"[{inner}]"
    if kind is dict:
        return f"{{{', '.join(f'{key!r}: {_literal(item, scope)}' for key, item in value.items())}}}"
    if kind is slice:
        return f"slice({', '.join(_literal(item, scope) for item in (value.start, value.stop, value.step))})"
    if value is None or kind in (bool, int, str):
        return repr(value)
    name = f"c{len(scope)}"
    scope[name] = value
    return name


def as_built(program: Program, root: nn.Module) -> fx.GraphModule:
    """One node for each step: torch functions, methods and Python operators."""
    return build(program, root)


def with_values(program: Program, root: nn.Module) -> fx.GraphModule:
    """The same with fake values recorded, as Dynamo leaves them; sizes that depend on data are symbols."""
    gm = build(program, root)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    values = program.make_inputs()
    inputs = [mode.from_tensor(each, static_shapes=True) if isinstance(each, torch.Tensor) else each for each in values]
    with torch.no_grad():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)
    return gm


def in_two_pieces(program: Program, root: nn.Module) -> fx.GraphModule:
    """The first half shared, then the rest written behind it as a pass would: tensors under the first free names."""
    half = len(program.steps) // 2
    later = [(step.args, step.kwargs) for step in program.steps[half:]]
    kept = sorted({ref.place for ref in refs([*later, program.outputs]) if ref.place < len(program.inputs) + half})
    held: dict[str, Any] = {}
    steps = tuple(_under_free_name(step, held, root) for step in program.steps[:half])
    gm = build(replace(program, steps=steps, outputs=tuple(map(Ref, kept))), held)
    pipeline.run(gm, [ShareMetadata()])
    gm = fx.GraphModule(gm, gm.graph)  # what the graph does not name is gone
    output = gm.graph.output_node()
    nodes: list[Any] = [None] * (len(program.inputs) + half)
    for place, node in zip(kept, output.args[0], strict=True):  # type: ignore[arg-type]
        nodes[place] = node
    gm.graph.erase_node(output)
    held = {name: None for name in dir(gm) if hasattr(gm, name)}
    for step in program.steps[half:]:
        step = _under_free_name(step, held, root)
        if step.kind in ("attribute", "module") and not hasattr(gm, step.target):
            setattr(gm, step.target, held[step.target])
        nodes.append(add_node(gm.graph, step, nodes))
    gm.graph.output(resolve(program.outputs, nodes))
    gm.recompile()
    return gm


in_two_pieces.plain = as_built  # type: ignore[attr-defined]


def _under_free_name(step: Step, held: dict[str, Any], root: nn.Module) -> Step:
    """The step with the name that its value has in `held`, where it is put under the next free one."""
    if step.kind not in ("attribute", "module"):
        return step
    value = named(root, step.target)
    stem = "constant" if step.kind == "attribute" else "module"
    names = (f"{stem}{index}" for index in itertools.count())
    name = next(name for name in names if held.get(name, value) is value)
    held[name] = value
    return replace(step, target=name)


def with_symbolic_trace(program: Program, root: nn.Module) -> fx.GraphModule:
    """What runs without an input runs while it is traced, and is kept as a constant."""
    return _completed(fx.symbolic_trace(traced(program, root)), program, root)


def with_make_fx(program: Program, root: nn.Module, mode: str = "real") -> fx.GraphModule:
    """ATen, with writes and views as they are."""
    with torch.no_grad():
        gm = make_fx(traced(program, root), tracing_mode=mode, _allow_non_fake_inputs=True)(*program.make_inputs())
    return _completed(gm, program, root)


def with_make_fx_symbolic(program: Program, root: nn.Module) -> fx.GraphModule:
    return with_make_fx(program, root, "symbolic")


def with_export(program: Program, root: nn.Module) -> fx.GraphModule:
    with torch.no_grad():
        exported = torch.export.export(traced(program, root), tuple(program.make_inputs()), strict=False)
    return _completed(exported.module(check_guards=False), program, root)


def _completed(gm: fx.GraphModule, program: Program, root: nn.Module) -> fx.GraphModule:
    """With roles, and with marks on the constants that tracing made."""
    owned = [each for name in program.attributes() for each in tensors_of(named(root, name))]
    mark_constants(gm, {storage for tensor in owned for storage in storages(tensor)})
    gm.meta.clear()  # the tracers pass on what they know of what was traced
    inputs = gm.graph.find_nodes(op="placeholder")
    for node, each in zip(inputs, program.inputs, strict=True):
        if program.has_roles:
            ROLE.set(node, each.role)
    return gm


FRONTS = {
    "fx": as_built,
    "fx with values": with_values,
    "two pieces": in_two_pieces,
    "symbolic_trace": with_symbolic_trace,
    "make_fx": with_make_fx,
    "make_fx symbolic": with_make_fx_symbolic,
    "export": with_export,
}
