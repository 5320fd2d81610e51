"""The command line: generate text, apply the passes, and list what is known and installed."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodeploy import options
from autodeploy.errors import AutodeployError, OptionError

if TYPE_CHECKING:
    import torch

    from autodeploy.runtime.requests import RequestOutput

_DTYPES = ("float32", "bfloat16", "float16")
_ERROR, _INTERRUPTED, _READER_GONE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failed check, 2 for a user's mistake, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    _show_plainly()
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
    except AutodeployError as error:
        print(f"{_error_label()} {error}", file=sys.stderr)
        return _ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has left; the interpreter would complain when it flushes stdout once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except OSError as error:
        # A file that cannot be read or written, a cache folder that cannot be made, a full disk.
        print(f"{_error_label()} {error}", file=sys.stderr)
        return _ERROR
    return code


def _show_plainly() -> None:
    """Nothing that is printed may raise, and what a request failed by is said once, without its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("autodeploy").addHandler(logging.NullHandler())


def _error_label() -> str:
    colored = sys.stderr.isatty() and options.from_environment().color
    return "\033[31merror:\033[0m" if colored else "error:"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autodeploy", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_generate(commands.add_parser("generate", help="answer one prompt or several at once"))
    _add_apply(commands.add_parser("apply", help="run the passes on a model and show what they did"))
    _add_coverage(
        commands.add_parser("coverage", help="say what becomes of each layer of a model, or why nothing does")
    )
    _add_diff(commands.add_parser("diff", help="compare two saved graphs, and fail on what must not change"))
    for name, meaning in {
        "passes": "the passes in their order",
        "fields": "the metadata that can be derived from a batch's layout",
        "kinds": "the sorts of attention node that are known",
        "backends": "the implementations of each kind of attention node",
        "doctor": "versions, devices, and which backends work here",
    }.items():
        listing = commands.add_parser(name, help=meaning, description=meaning)
        listing.set_defaults(run=_list, listing=name)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="'demo', a folder, or a Hugging Face hub id")
    _add_choices(parser)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; as they were saved by default")
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME|TYPE=NAME",
        help="a backend for every node, or for one layer type or kind (repeatable); chosen for each node by default",
    )
    parser.add_argument("--page-size", type=int, help="tokens per cache page (default 16, on a GPU 64)")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--max-tokens", type=int, default=128, help="per answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k best; 0, the default, among all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the best of this total probability")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer here (repeatable)")
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="list each token with its log probability, and the K best"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they are, without chat template")
    parser.add_argument("--eager", action="store_true", help="run the graph without compiling it")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences in one step (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="say on stderr what the passes did and how long it took")
    parser.set_defaults(run=_generate)


def _add_apply(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="write report.txt, trace.json, graph_before.txt, graph_after.txt"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows what each pass did")
    parser.set_defaults(run=_apply)


def _add_coverage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        metavar="model",
        help="a model type (a tiny model with random weights), or a folder or hub id (its configuration alone)",
    )
    _add_choices(parser)
    parser.add_argument("--json", action="store_true", help="print data")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page")
    parser.add_argument(
        "--zoo", action="store_true", help="cover all model types, or those that are named, in a process each"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("coverage.jsonl"),
        metavar="FILE",
        help="with --zoo: what is known is read from here and added to (default %(default)s)",
    )
    parser.add_argument(
        "--limit", type=float, default=240.0, metavar="SECONDS", help="with --zoo: for each type (default %(default)s)"
    )
    parser.set_defaults(run=_coverage)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    from autodeploy.viz import gate

    gate.add_arguments(parser)
    parser.set_defaults(run=gate.run)


def _generate(args: argparse.Namespace) -> None:
    from autodeploy.app.llm import LLM
    from autodeploy.runtime.requests import SamplingParams

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
    )
    llm = LLM(
        args.model,
        backend=parse_backend(args.backend),
        compile=not args.eager,
        dtype=_dtype(args.dtype),
        page_size=args.page_size,
        max_num_seqs=args.max_num_seqs,
    )
    pieces = llm.stream_many(args.prompts, params, chat=not args.raw)
    if len(args.prompts) == 1:
        _print_answer(piece for _, piece in pieces)
    else:
        _print_answers(pieces)
    if args.logprobs is not None:
        for number, output in enumerate(pieces.outputs(), start=1):
            _print_logprobs(output, llm.tokenizer, "" if len(args.prompts) == 1 else f"[{number}] ")
    if args.report:
        print(llm.summary(), file=sys.stderr)


def _print_answer(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _print_answers(pieces: Iterable[tuple[int, str]]) -> None:
    """Answers grow side by side, so each is printed by whole lines with its prompt's number, counted from 1."""
    unfinished: dict[int, str] = {}
    try:
        for index, piece in pieces:
            *lines, unfinished[index] = (unfinished.get(index, "") + piece).split("\n")
            for line in lines:
                print(f"[{index + 1}] {line}", flush=True)
    finally:
        # Also where one of them has failed, or somebody has seen enough.
        for index in sorted(unfinished):
            print(f"[{index + 1}] {unfinished[index]}")


def _print_logprobs(output: RequestOutput, tokenizer: Any, label: str) -> None:
    """A line for each token: its text and log probability, and those of the best."""

    def spell(token_id: int, logprob: float) -> str:
        return f"{logprob:.3f} {tokenizer.decode([token_id])!r}"

    for each in output.logprobs or ():
        own, best = spell(each.token_id, each.logprob), "   ".join(spell(*pair) for pair in each.top)
        print(f"{label}{own:24}{best}".rstrip())


def _apply(args: argparse.Namespace) -> None:
    from autodeploy.app.models import load_model, resolve_model
    from autodeploy.compiler.apply import apply
    from autodeploy.trace import trace
    from autodeploy.viz import Recorder
    from autodeploy.viz.page import render_page

    if args.save is not None and args.save.exists() and not args.save.is_dir():
        raise OptionError(f"--save {args.save} is a file", fix="name a folder")
    if args.html is not None and (args.html.is_dir() or not args.html.parent.is_dir()):
        raise OptionError(f"--html {args.html} is a folder, or in none", fix="name a file in a folder that is there")
    model, _ = load_model(resolve_model(args.model), _dtype(args.dtype))
    gm = trace(model)
    recorder = Recorder() if args.html or args.save else None
    try:
        result = apply(gm, parse_backend(args.backend), page_size=args.page_size, recorder=recorder)
    finally:
        # Also what a pass that raised has left behind.
        if recorder and args.html:
            args.html.write_text(render_page(recorder.trace(), f"autodeploy apply {args.model}"), encoding="utf-8")
    print(result.report)
    if args.save is None:
        return
    args.save.mkdir(parents=True, exist_ok=True)
    result.report.save(args.save / "trace.json")
    texts = {
        "report": str(result.report),
        "graph_before": gm.print_readable(print_output=False),
        "graph_after": result.module.print_readable(print_output=False),
    }
    for name, text in texts.items():
        (args.save / f"{name}.txt").write_text(text + "\n")


def _coverage(args: argparse.Namespace) -> int:
    from autodeploy.app import coverage_zoo

    choices = {"--backend": args.backend, "--dtype": args.dtype, "--page-size": args.page_size}
    if not args.models and not args.zoo:
        raise OptionError("coverage of nothing", fix="name a model type, a folder or a hub id, or give --zoo")
    if args.zoo and any(choices.values()):
        given = ", ".join(name for name, value in choices.items() if value)
        raise OptionError(f"{given} with --zoo, which is made with defaults", fix="leave it out, or --zoo")
    return coverage_zoo.run(args, parse_backend(args.backend), _dtype(args.dtype))


def _list(args: argparse.Namespace) -> None:
    from autodeploy.app import doctor

    listings = {
        "passes": doctor.pass_lines,
        "fields": doctor.field_lines,
        "kinds": doctor.kind_lines,
        "backends": doctor.backend_lines,
        "doctor": doctor.doctor_lines,
    }
    print("\n".join(listings[args.listing]()))


def parse_backend(choices: Sequence[str]) -> str | dict[str, str]:
    """What --backend was given, as `apply` takes it: "auto", one name, or a dict from layer type or kind to name."""
    if not choices:
        return "auto"
    if len(choices) == 1 and "=" not in choices[0]:
        return choices[0]
    pairs = [choice.partition("=") for choice in choices]
    if not all(kind and name for kind, _, name in pairs):
        raise OptionError(
            f"--backend {' --backend '.join(choices)} is ambiguous",
            fix="give one NAME for every node, or TYPE=NAME each time, such as full_attention=sdpa",
        )
    return {kind: name for kind, _, name in pairs}


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)
