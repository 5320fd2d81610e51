"""Programs through `torch.compile`: our pass inside AOTAutograd's graph, run by FX or by Inductor.

A difference counts where the same way without our pass shows none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from functorch.compile import make_boxed_func
from sharing_check import Different, Invalid, Tracer, eager, state_of
from sharing_fronts import traced
from sharing_oracle import Sight, State, difference, see
from sharing_program import Input, Program, Ref, Step, refs, resolve
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from autodeploy.graph.aliasing import storages
from autodeploy.inductor import torch_compile as dynamo


def interpreted(shares: bool) -> Callable[..., Any]:
    """A backend that runs AOTAutograd's graph as it is, with or without our pass in it."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        ours = dynamo._SharedMetadata(
            "", dynamo._Inputs(dynamo._roles(gm, example_inputs)), set(storages(gm)), keeps_going=False
        )

        def compile_inference(aten: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            if shares:
                ours(aten.graph, is_inference=True)
                aten.recompile()
            return make_boxed_func(aten.forward)

        return aot_autograd(
            fw_compiler=compile_inference,
            inference_compiler=compile_inference,
            keep_inference_input_mutations=True,
        )(gm, example_inputs)

    return backend


Compile = Callable[[nn.Module], Any]
# By name: with our pass in it, and the same without.
WAYS: dict[str, tuple[Compile, Compile]] = {
    "torch.compile": (
        partial(torch.compile, backend=interpreted(True)),
        partial(torch.compile, backend=interpreted(False)),
    ),
    "torch.compile, dynamic": (
        partial(torch.compile, backend=interpreted(True), dynamic=True),
        partial(torch.compile, backend=interpreted(False), dynamic=True),
    ),
    "Inductor": (partial(torch.compile, backend="autodeploy"), partial(torch.compile, backend="inductor")),
}


def check_compiled(program: Program, way: str) -> bool:
    """Raises Different where a way with our pass differs from eager as the way without does not; True where not."""
    shared, plain = WAYS[way]
    root = program.root()
    state = state_of(program, root)
    try:
        want = eager(program, root, state)
        got = _see_compiled(program, root, state, shared, want.num_calls)
        if isinstance(got, Sight) and difference(want, got) is None:
            return True
        without = _see_compiled(program, root, state, plain, want.num_calls)
    finally:
        state.restore()
        torch._dynamo.reset()
    if isinstance(without, Exception):
        raise Invalid(str(without)) if isinstance(got, Exception) else Tracer(str(without))
    if isinstance(got, Exception):
        raise Different(f"pass: {type(got).__name__}: {got}") from got
    if (found := difference(without, got)) is not None:
        raise Different(found)
    raise Tracer(f"{difference(want, got)}")


def _see_compiled(
    program: Program, root: nn.Module, state: State, compile_: Compile, num_calls: int
) -> Sight | Exception:
    torch._dynamo.reset()
    state.restore()
    try:
        return see(compile_(traced(program, root)), program.make_inputs, state, num_calls)
    except Exception as error:
        return error


def packed(programs: Sequence[Program]) -> Program:
    """One program that does what several do, one after another: one compilation for all of them."""
    inputs: list[Input] = [each for program in programs for each in program.inputs]
    steps: list[Step] = []
    outputs: list[Any] = []
    first = 0
    for program in programs:
        names = [Ref(first + place) for place in range(len(program.inputs))]
        first += len(program.inputs)
        for step in program.steps:
            names.append(Ref(len(inputs) + len(steps)))
            steps.append(replace(step, args=resolve(step.args, names), kwargs=resolve(step.kwargs, names)))
        outputs += refs(resolve(program.outputs, names))
    return Program(tuple(inputs), tuple(steps), tuple(outputs), programs[0].root)
