"""From a finished graph to a callable step: weights become inputs, Inductor compiles once for all sizes.

The compiled step is dynamic in T (tokens), R (rows of the layout) and C (its columns, which hold the pages per
sequence), so that no batch recompiles it. Compiled code is saved with `Lowered.save` and comes back in a later
process without passes or Inductor.
"""

from __future__ import annotations

import io
import json
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile
from torch._inductor.standalone_compile import AOTCompiledArtifact
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from autodeploy.compiler.report import Report
from autodeploy.graph.edit import PREPARE, copy_module, get_attribute, is_same_tensor, placeholders, prepare_nodes
from autodeploy.graph.meta import EXAMPLE_VALUE, LOOKED_AT, ROLE, VALUE
from autodeploy.graph.sizes import hint
from autodeploy.inductor.fingerprint import NotHashable, tensor_bytes
from autodeploy.inductor.graph_key import own_tensors
from autodeploy.inductor.keep import keep_metadata
from autodeploy.inductor.kernel_files import pack, unpack
from autodeploy.inductor.machine import machine_key
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS, LayoutSpec
from autodeploy.metadata.span import span_of
from autodeploy.ops.cache import Cache, Paged, State
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind


@dataclass(frozen=True)
class Lowered:
    """A compiled step and what it needs: `run(attributes, input_ids, layout, *caches) -> logits [R, V]`.

    `artifacts` has one that is right for any batch, and may have one for each other kind of step. `attributes` names
    the model's tensors in the order in which the code takes them; `constants` holds those that are the graph's own and
    not the model's.
    """

    artifacts: dict[StepKind, AOTCompiledArtifact]
    attributes: tuple[str, ...]
    constants: dict[str, Tensor]
    looked_at: dict[str, str]
    layout_spec: LayoutSpec
    cache_specs: tuple[Cache, ...]
    report: Report

    def bind(self, model: nn.Module, kind: StepKind = MIXED) -> Callable[..., Tensor]:
        """The step over `model`'s weights. Raises AttributeError where it lacks one, KeyError for a missing kind."""
        weights = [
            self.constants[name] if name in self.constants else get_attribute(model, name) for name in self.attributes
        ]
        weights = [weight.detach() for weight in weights]
        artifact = self.artifacts[kind]

        def step(input_ids: Tensor, layout: Tensor, *caches: Tensor) -> Tensor:
            return artifact(*weights, input_ids, layout, *caches)[0]

        return step

    def save(self) -> bytes:
        """Everything, as `load` takes it."""
        packed = {kind: pack(artifact) for kind, artifact in self.artifacts.items()}
        constants, file = io.BytesIO(), io.BytesIO()
        torch.save(self.constants, constants)
        meta = {
            "kinds": list(self.artifacts),
            "attributes": self.attributes,
            "looked_at": self.looked_at,
            "layout_spec": asdict(self.layout_spec) | {"spans": [span.name for span in self.layout_spec.spans]},
            "cache_specs": [
                {**asdict(spec), "dtype": str(spec.dtype).removeprefix("torch."), "sort": type(spec).__name__}
                for spec in self.cache_specs
            ],
            "report": self.report.to_json(),
        }
        with zipfile.ZipFile(file, "w") as archive:  # which has a checksum of each part
            archive.writestr("step.json", json.dumps(meta, indent=1))
            archive.writestr("constants.pt", constants.getvalue())
            for kind, (artifact, _) in packed.items():
                archive.writestr(f"{kind}.bin", artifact)
            libraries = {name: library for _, part in packed.values() for name, library in part.items()}
            for name, library in libraries.items():
                archive.writestr(f"{name}.so", library)
        return file.getvalue()

    @staticmethod
    def load(data: bytes, scratch: Path) -> Lowered:
        """What `save` gave; runs code that is in it. Any error means that it has to be made again.

        `scratch` is an empty folder for libraries; a loaded library does without its file.
        """
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.endswith(".so")])
            meta = json.loads(archive.read("step.json"))
            spec = meta["layout_spec"]
            return Lowered(
                artifacts={kind: unpack(archive.read(f"{kind}.bin"), scratch) for kind in meta["kinds"]},
                attributes=tuple(meta["attributes"]),
                constants=torch.load(io.BytesIO(archive.read("constants.pt")), weights_only=True),
                looked_at=meta["looked_at"],
                layout_spec=LayoutSpec(**{**spec, "spans": tuple(map(span_of, spec["spans"]))}),
                cache_specs=tuple(_cache(part) for part in meta["cache_specs"]),
                report=Report.from_json(meta["report"]),
            )


def _cache(data: dict[str, Any]) -> Cache:
    sort = {each.__name__: each for each in (Paged, State)}[data.pop("sort")]
    return sort(**{**data, "shape": tuple(data["shape"]), "dtype": getattr(torch, data["dtype"])})


def lower(
    gm: fx.GraphModule,
    model: nn.Module,
    layout_spec: LayoutSpec,
    cache_specs: Sequence[Cache],
    report: Report,
    *,
    decode: fx.GraphModule | None = None,
) -> Lowered:
    """Compile `gm`, made by the passes from a trace of `model`, with Inductor. Leaves `gm` as it is.

    `decode` is `gm` as `specialize_step` made it for decode steps, compiled as well where it is given.
    """
    device = next(model.parameters()).device
    artifact, attributes = _compile(gm, layout_spec, device)
    artifacts: dict[StepKind, AOTCompiledArtifact] = {MIXED: artifact}
    if decode is not None:
        artifacts[DECODE], same = _compile(decode, layout_spec, device)
        assert list(same) == list(attributes)
    own = own_tensors(model)
    names = tuple(_name_in(own, name, tensor) for name, tensor in attributes.items())
    named = zip(names, attributes.values(), strict=True)
    constants = {name: tensor.detach() for name, tensor in named if not is_same_tensor(own.get(name), tensor)}
    looked_at = hashes({name: own[name] for name in LOOKED_AT.get(gm, ()) if name in own})
    return Lowered(artifacts, names, constants, looked_at, layout_spec, tuple(cache_specs), report)


def _compile(
    gm: fx.GraphModule, layout_spec: LayoutSpec, device: torch.device
) -> tuple[AOTCompiledArtifact, dict[str, Tensor]]:
    """The code of `gm` and, in the order in which it takes them, the tensors that are attributes of it."""
    lifted, attributes = lift_attributes(copy_module(gm))
    keep_metadata(lifted)
    for node in lifted.graph.nodes:
        # By this torch knows a tensor, and it gives code away only of graphs that call methods of nothing else.
        if isinstance(VALUE.get(node), Tensor):
            EXAMPLE_VALUE.set(node, VALUE.of(node))
    example_inputs = _example_inputs(gm, layout_spec)
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    with tracing(TracingContext(fake_mode)), torch.no_grad():
        fakes = [fake_mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in attributes.values()]
        fakes += [_fake(fake_mode, tensor, dims) for tensor, dims in example_inputs]
        with torch.compiler.config.patch(cache_key_tag=_tag(device)):  # type: ignore[attr-defined]
            artifact = standalone_compile(lifted, fakes, dynamic_shapes="from_tracing_context", options={}, aot=True)
    assert isinstance(artifact, AOTCompiledArtifact)
    return artifact, attributes


def _name_in(own: Mapping[str, Tensor], name: str, tensor: Tensor) -> str:
    """The model's name of one of its tensors, which prepare_metadata may read as well; else `name`."""
    inside = name.removeprefix(f"{PREPARE}.")
    return inside if is_same_tensor(own.get(inside), tensor) else name


def _tag(device: torch.device) -> str:
    """Keeps the code apart that Inductor keeps itself: its key leaves out the instruction set and our lowerings."""
    try:
        return machine_key(device)
    except NotHashable:
        return uuid.uuid4().hex  # so that nothing is found


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The hash of the values of each tensor."""
    return {name: tensor_bytes(tensor) for name, tensor in sorted(tensors.items())}


def lift_attributes(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """Turn every tensor attribute of `gm`, and of its prepare_metadata, into an input in front of the others.

    Returns the new module, which holds no tensors and outputs a tuple, and the attributes by name in input order.
    The graph of `gm` is used up.
    """
    attributes: dict[str, Tensor] = {}
    for call in prepare_nodes(gm):
        _lift_prepare(gm, call)
    first = placeholders(gm)[0]
    inputs: dict[str, fx.Node] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in inputs:
            attributes[name] = get_attribute(gm, name)
            with gm.graph.inserting_before(first):
                inputs[name] = gm.graph.placeholder("attr_" + name.replace(".", "_"))
        node.replace_all_uses_with(inputs[name])
        gm.graph.erase_node(node)
    output = gm.graph.output_node()
    output.args = ((output.args[0],),)
    return _bare(gm), attributes


def _bare(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph without the weights, which AOTAutograd would lift a second time."""
    root = nn.Module()
    if prepare_nodes(gm):
        root.add_module(PREPARE, fx.GraphModule(nn.Module(), getattr(gm, PREPARE).graph))
    return fx.GraphModule(root, gm.graph)


def _lift_prepare(gm: fx.GraphModule, call: fx.Node) -> None:
    inner = getattr(gm, PREPARE)
    for node in inner.graph.find_nodes(op="get_attr"):
        name = f"{PREPARE}.{node.target}"
        with gm.graph.inserting_before(call):
            outer = gm.graph.get_attr(name)
        last = inner.graph.find_nodes(op="placeholder")[-1]
        with inner.graph.inserting_after(last):
            lifted = inner.graph.placeholder("attr_" + str(node.target).replace(".", "_"))
        call.args = (*call.args, outer)
        node.replace_all_uses_with(lifted)
        inner.graph.erase_node(node)


def _example_inputs(gm: fx.GraphModule, layout_spec: LayoutSpec) -> list[tuple[Tensor, tuple[int, ...]]]:
    """The inputs of `gm` as their values describe them, at the sizes that those were given to tune for, each with its
    dynamic dims. Every KV group is tuned for the pages that one would have.
    """
    inputs: list[tuple[Tensor, tuple[int, ...]]] = []
    for node in placeholders(gm):
        value: Tensor = VALUE.of(node)
        shape = [hint(size) for size in value.shape]
        if ROLE.of(node) == "layout":
            shape[1] = layout_spec.num_columns(shape[1] - NUM_FIXED_COLUMNS)
        dims = [dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
        inputs.append((torch.empty(shape, dtype=value.dtype, device=value.device), tuple(dims)))
    return inputs


def _fake(mode: FakeTensorMode, tensor: Tensor, dynamic_dims: tuple[int, ...]) -> Tensor:
    sizes = [DimDynamic.DYNAMIC if dim in dynamic_dims else DimDynamic.STATIC for dim in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
