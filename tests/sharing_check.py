"""One program through one front end and the pass: eager is the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from sharing_oracle import Sight, State, difference, see, tensors_of
from sharing_program import CONSTANT_NAME, Program, build, named, refs, without_input, without_step
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from autodeploy.compiler import pipeline
from autodeploy.graph.edit import PREPARE
from passes import ShareMetadata

Front = Callable[[Program, nn.Module], fx.GraphModule]


class Invalid(Exception):
    """Eager itself, or a tracer, refuses the program."""


class Different(AssertionError):
    """The pass changed what a caller can see."""


class Tracer(Exception):
    """The graph was different from eager before any pass."""


def as_built(program: Program, root: nn.Module) -> fx.GraphModule:
    return build(program, root)


def check(program: Program, front: Front = as_built) -> int:
    """Raises Different, Invalid or Tracer; returns what `apply` says it did."""
    root = program.root()
    state = state_of(program, root)
    try:
        return _check(program, root, state, front)
    finally:
        state.restore()


def _check(program: Program, root: nn.Module, state: State, front: Front) -> int:
    want = eager(program, root, state)
    state.restore()
    gm = _front(program, root, front)
    matches = _share(gm)
    found = _compare(program, want, gm, state)
    if found is not None:
        _compare_with_graph(program, root, state, front, gm, found)
    state.restore()
    done = text(gm)
    again = ShareMetadata().apply(gm)
    if again or text(gm) != done:
        raise Different(f"again: {again} matches\n{done}\nbecame\n{text(gm)}")
    return matches


def state_of(program: Program, root: nn.Module) -> State:
    """What the program uses of its root; all but the constants that tracing made is somebody's."""
    tensors = {name: tensors_of(named(root, name)) for name in sorted(program.attributes())}
    owned = [tensor for name, found in tensors.items() for tensor in found if not name.startswith(CONSTANT_NAME)]
    return State(itertools.chain.from_iterable(tensors.values()), owned)


def eager(program: Program, root: nn.Module, state: State) -> Sight:
    try:
        return see(lambda *inputs: program.run(root, *inputs), program.make_inputs, state)
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error


def forget_tracers() -> None:
    """A tracer that fails may leave the process unable to trace anything."""
    for key in (torch._C.DispatchKey.Python, torch._C.DispatchKey.PythonTLSSnapshot):
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    assert not torch._C._len_torch_dispatch_stack()


def _front(program: Program, root: nn.Module, front: Front) -> fx.GraphModule:
    forget_tracers()
    torch.default_generator.manual_seed(1)
    try:
        gm = front(program, root)
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error
    # torch's own `map` leaves constants of its bodies fake.
    if any(isinstance(tensor, FakeTensor) for tensor in (*gm.buffers(), *gm.parameters())):
        raise Tracer("make_fx left a fake tensor in the graph")
    return gm


def _share(gm: fx.GraphModule) -> int:
    before = text(gm)
    try:
        (record,) = pipeline.run(gm, [ShareMetadata()])
    except Exception as error:
        raise Different(f"pass: {type(error).__name__}: {error}\n{before}") from error
    return record.matches


def _compare(program: Program, want: Sight, gm: fx.GraphModule, state: State) -> str | None:
    try:
        got = see(gm.forward, program.make_inputs, state, want.num_calls)
    except Exception as error:
        return f"raises: {type(error).__name__}: {error}"
    if got.num_calls != want.num_calls:
        return "raises: in the second call"
    return difference(want, got)


def _compare_with_graph(
    program: Program, root: nn.Module, state: State, front: Front, gm: fx.GraphModule, found: str
) -> None:
    """Raises Tracer where the graph was already different before the pass and the pass changed nothing more."""
    state.restore()
    plain = _front(program, root, getattr(front, "plain", front))
    try:
        want = see(plain.forward, program.make_inputs, state)
    except Exception as error:
        raise Tracer(f"{type(error).__name__}: {error}") from error
    now = _compare(program, want, gm, state)
    if now is None:
        raise Tracer(found)
    for size in (8, 64, 512) * 2:  # what reads memory that nobody wrote to differs from itself
        junk = [torch.full((size,), float(size)) for _ in range(64)]
        del junk
        if difference(want, see(plain.forward, program.make_inputs, state, want.num_calls)) is not None:
            raise Invalid("differs from itself")
    raise Different(f"{now}\n{text(plain)}\nbecame\n{text(gm)}")


def text(gm: fx.GraphModule) -> str:
    prepare = getattr(gm, PREPARE, None)
    return str(gm.graph) + (f"\n{PREPARE}: {prepare.graph}" if isinstance(prepare, fx.GraphModule) else "")


def failure(program: Program, front: Front = as_built) -> str | None:
    try:
        check(program, front)
    except Different as error:
        return str(error)
    except (Invalid, Tracer):
        return None
    return None


def minimal(program: Program, front: Front = as_built) -> Program:
    """Drops steps, outputs and inputs' uses for as long as the pass still fails in the same kind."""
    kind = _kind(failure(program, front))

    def fails(small: Program | None) -> bool:
        return small is not None and _kind(failure(small, front)) == kind

    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(program):
            if fails(candidate):
                program, smaller = candidate, True
                break
    return program


def _kind(message: str | None) -> str | None:
    return None if message is None else message.split(":")[0]


def _smaller(program: Program) -> Iterator[Program]:
    for index in reversed(range(len(program.steps))):
        if (small := without_step(program, index)) is not None:
            yield small
    outputs = list(refs(program.outputs))
    if len(outputs) > 1:
        for index in range(len(outputs)):
            yield replace(program, outputs=tuple(outputs[:index] + outputs[index + 1 :]))
    used = {ref.place for step in program.steps for ref in refs((step.args, step.kwargs))} | {
        ref.place for ref in outputs
    }
    for place in set(range(len(program.inputs))) - used:
        yield without_input(program, place)
    if program.grows:
        yield replace(program, grows=False)
