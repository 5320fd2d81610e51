"""What `backend="autodeploy"` does to raw graphs of transformers' models, beside `backend="inductor"`.

    python benchmarks/compile_zoo.py [--types gemma2 llama] [--layers 4 32]

Tiny models with random weights, float32, under no_grad, fullgraph, a batch of 2 whose length is dynamic (2 x 64 when
timed) with a padding mask. A row that is in the output already is not measured again.

Both backends compile at the same time, each in a process of its own with empty caches and one thread: a busy machine
slows both alike. Seconds of the processor are the steadier measure there. Then the two processes take turns in running
steps; `noise` is Inductor against itself in the same rounds. Where outputs differ, or autodeploy looks slower,
Inductor is compiled once more in a third process: its difference to the first, and its pace, are what to compare with.

Layout-only nodes are counted in the graphs that Inductor lowers, by a structural hash that shares no code with the
passes. Left out of compile seconds, and the same for both: imports, and Inductor's check that the compiler knows the
processor's vector instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from machine import describe_machine
from measure import compare_steps, count_layout_only, seconds_of, take_turns, watch_inductor
from torch import Tensor, fx

# Those that build masks, rotary tables or ALiBi per layer or per kind of layer come first.
_NAMES = """
    gemma2 gemma3_text gpt_oss cohere2 codegen llama4_text gemma4_text inkling_text mellum bloom mpt opt gpt2 llama
    qwen3 mistral phi3 mixtral olmo2 glm4
"""
TYPES = tuple(_NAMES.split())
EAGER = ("gemma2", "gpt_oss", "codegen", "bloom", "mpt")  # transformers has no sdpa for these
BASE, OURS = "inductor", "autodeploy"
BATCH, LENGTH, OTHER_LENGTH = 2, 64, 48
ROUNDS, BLOCK_SECONDS = 15, 0.05
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--backend", default=OURS, help=f"instead of {OURS}; {BASE} shows the noise of the comparison")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compile_zoo.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        model_type, layers, backend, logits = args.worker
        _serve(model_type, int(layers), backend, Path(logits))
        return
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    done = {(row["model_type"], row["layers"]) for row in rows}
    cases = [(model_type, layers) for layers in args.layers for model_type in args.types]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases, 1):
        if case in done:
            continue
        print(f"{number} of {len(cases)}: {case[0]} with {case[1]} layers", file=sys.stderr, flush=True)
        rows.append(_row(*case, args.backend))
        args.output.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(_markdown(rows))


class WorkerError(Exception):
    """The end of what a worker wrote before it died."""


class Worker:
    """A process that compiles one model with one backend, and then runs steps when asked."""

    def __init__(self, folder: Path, name: str, model_type: str, layers: int, backend: str) -> None:
        self.logits = folder / f"{name}.pt"
        self._log = (folder / f"{name}.log").open("w+")
        command = [sys.executable, __file__, "--worker", model_type, str(layers), backend, str(self.logits)]
        environment = os.environ | _ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(folder / name)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

        assert self._process.stdin
        assert self._process.stdout
        self._commands, self._answers = self._process.stdin, self._process.stdout

    def ask(self, command: str) -> None:
        print(command, file=self._commands, flush=True)

    def answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._log.seek(0)
            raise WorkerError("".join(self._log.readlines()[-8:]).strip())
        return json.loads(line)

    def steps(self, count: int) -> list[float]:
        self.ask(f"steps {count}")
        return self.answer()

    def close(self) -> None:
        self._process.communicate()
        self._log.close()


@contextmanager
def _workers(model_type: str, layers: int, *backends: str) -> Iterator[list[Worker]]:
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            Worker(Path(folder), f"{index}-{name}", model_type, layers, name) for index, name in enumerate(backends)
        ]
        try:
            for worker in workers:
                worker.answer()  # its imports are done
            yield workers
        finally:
            for worker in workers:
                worker.close()


def _row(model_type: str, layers: int, backend: str) -> dict[str, Any]:
    """Everything measured of one model, as plain data; `error` instead where one of the backends fails."""
    machine = describe_machine()
    row = {"model_type": model_type, "layers": layers, "attention": _attention(model_type)}
    row |= {key: machine[key] for key in ("date", "load_average")}
    try:
        return row | _compare(model_type, layers, backend)
    except WorkerError as error:
        print(error, file=sys.stderr)
        return row | {"error": str(error).splitlines()[-1]}


def _compare(model_type: str, layers: int, backend: str) -> dict[str, Any]:
    with _workers(model_type, layers, BASE, backend) as (base, ours):
        compiled = _compile(base, ours)
        found: dict[str, Any] = {key: {BASE: compiled[0][key], OURS: compiled[1][key]} for key in compiled[0]}
        found |= _take_turns(base, ours)
        found["outputs"] = _compare_logits(base, ours)
        is_slower = found["step_ratio"][1] > found["step_noise"][2]
        if found["outputs"]["difference"] or is_slower:
            found["inductor_again"] = _again(model_type, layers, base)
    return found


def _again(model_type: str, layers: int, base: Worker) -> dict[str, Any]:
    """Inductor compiled a second time, beside `base`: how far two runs of the same lie apart."""
    with _workers(model_type, layers, BASE) as (again,):
        _compile(again)
        steps = _take_turns(base, again)
        return {"difference": _compare_logits(base, again)["difference"], "step_ratio": steps["step_ratio"]}


def _compile(*workers: Worker) -> list[dict[str, Any]]:
    for worker in workers:
        worker.ask("compile")
    return [worker.answer() for worker in workers]


def _take_turns(base: Worker, other: Worker) -> dict[str, Any]:
    count = max(3, round(BLOCK_SECONDS / min(base.steps(5))))
    return compare_steps(take_turns({BASE: lambda: base.steps(count), OURS: lambda: other.steps(count)}, ROUNDS))


def _compare_logits(base: Worker, other: Worker) -> dict[str, Any]:
    """Largest absolute difference, and the largest logit to hold it against."""
    first, second = torch.load(base.logits), torch.load(other.logits)
    return {"difference": float((first - second).abs().max()), "scale": float(first.abs().max())}


def _attention(model_type: str) -> str:
    return "eager" if model_type in EAGER else "sdpa"


def _serve(model_type: str, layers: int, backend: str, logits: Path) -> None:
    """The worker's side: one JSON line when ready, and one for each line read."""
    from zoo import VOCAB_SIZE, tiny

    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may print there
    model = tiny(model_type, layers, _attention(model_type))
    ids = torch.randint(5, VOCAB_SIZE - 5, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    inputs = {
        length: {"input_ids": ids[:, :length].clone(), "attention_mask": mask[:, :length].clone()}
        for length in (LENGTH, OTHER_LENGTH)
    }
    for tensor in inputs[LENGTH].values():
        torch._dynamo.mark_dynamic(tensor, 1)
    weights: set[int] = set()
    step = torch.compile(model, backend=_noting(backend, weights), fullgraph=True)

    def run(length: int = LENGTH) -> Tensor:
        return step(**inputs[length], use_cache=False).logits

    _say(answers, "ready")
    with torch.no_grad():
        for line in sys.stdin:
            command, _, count = line.partition(" ")
            is_compile = command.strip() == "compile"
            _say(
                answers,
                _first_step(run, weights, logits) if is_compile else [seconds_of(run) for _ in range(int(count))],
            )


def _say(answers: IO[str], data: Any) -> None:
    print(json.dumps(data), file=answers, flush=True)


def _noting(backend: str, weights: set[int]) -> Any:
    """The backend of that name, which notes the places of weights among the graph's inputs in `weights`."""

    def compile_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        weights.update(place for place, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter))
        return torch._dynamo.lookup_backend(backend)(gm, example_inputs)

    return compile_graph


def _first_step(run: Any, weights: set[int], logits: Path) -> dict[str, Any]:
    """Compile, keep the logits, and tell what the compilation took and made."""
    before = _processor_seconds()
    with watch_inductor() as watched:
        seconds = seconds_of(run)
    processor_seconds = _processor_seconds() - before
    torch.save(run(), logits)
    run(OTHER_LENGTH)
    graph = watched.graphs[-1].graph
    places = [node.meta["desc"].idx for node in graph.find_nodes(op="placeholder")]
    assert places == list(range(len(places))), "AOTAutograd has changed the order of the inputs"
    layout_only, unique = count_layout_only(graph, weights)
    return {
        "compile_seconds": round(seconds, 2),
        "compile_processor_seconds": round(processor_seconds, 2),
        "compilations": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "nodes": len(graph.nodes),
        "layout_only": layout_only,
        "layout_only_unique": unique,
        "kernels": watched.num_kernels(),
    }


def _processor_seconds() -> float:
    """User and system time of this process and of the compilers that it ran."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _markdown(rows: list[dict[str, Any]]) -> str:
    header = ["model", "layers", "layout-only nodes", "left twice", "kernels", "compile, CPU s", "step, ms"]
    header += ["step ratio", "noise", "difference"]
    cells = [_cells(row) for row in rows if "error" not in row]
    table = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *cells]]
    failed = [
        f"{row['model_type']} with {row['layers']} layers failed: {row['error']}" for row in rows if "error" in row
    ]
    return "\n".join(table + failed)


def _cells(row: dict[str, Any]) -> list[str]:
    """Inductor -> autodeploy, ratios as median [lower quartile, upper quartile]."""
    low, ratio, high = row["step_ratio"]
    noise_low, _, noise_high = row["step_noise"]
    generated = {name: kernels["generated"] for name, kernels in row["kernels"].items()}
    again = row.get("inductor_again")
    return [
        row["model_type"],
        str(row["layers"]),
        _pair(row["layout_only"], "d"),
        str(row["layout_only"][OURS] - row["layout_only_unique"][OURS]),
        _pair(generated, "d"),
        _pair(row["compile_processor_seconds"], ".1f"),
        _pair(row["step_ms"], ".2f"),
        f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
        f"[{noise_low:.2f}, {noise_high:.2f}]" + (f", again {again['step_ratio'][1]:.2f}" if again else ""),
        f"{row['outputs']['difference']:.1g}" + (f" (Inductor twice: {again['difference']:.1g})" if again else ""),
    ]


def _pair(values: dict[str, float], form: str) -> str:
    return f"{values[BASE]:{form}} -> {values[OURS]:{form}}"


if __name__ == "__main__":
    main()
