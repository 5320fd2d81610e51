"""The command line: what it parses, prints, and returns."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autodeploy.app import llm as llm_module
from autodeploy.app.cli import main, parse_backend
from autodeploy.errors import OptionError, RequestFailed
from autodeploy.kernels.registry import backends, catalogue
from autodeploy.ops.kinds import kinds
from passes import default


class FakeLLM:
    """Stands in for the engine: answers in two pieces, or raises `failure` on the way."""

    failure: BaseException | None = None
    calls: list[SimpleNamespace]

    def __init__(self, model: str, **options: Any) -> None:
        self.summary = lambda: "the report\nthe timings"
        self.calls.append(SimpleNamespace(model=model, options=options))

    def stream_many(self, prompts: list[str], params: Any, chat: bool) -> Iterator[tuple[int, str]]:
        self.calls[-1].__dict__.update(prompts=prompts, params=params, chat=chat)
        yield from ((index, f"one {prompt}") for index, prompt in enumerate(prompts))
        if self.failure is not None:
            raise self.failure
        yield from ((index, "\ntwo") for index in reversed(range(len(prompts))))


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    fake = type("Fake", (FakeLLM,), {"calls": []})
    monkeypatch.setattr(llm_module, "LLM", fake)
    return fake


def test_generate_streams_one_answer(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "demo", "hi"]) == 0
    assert capsys.readouterr() == ("one hi\ntwo\n", "")


def test_generate_numbers_several_answers(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "demo", "a", "b"]) == 0
    assert capsys.readouterr().out.splitlines() == ["[2] one b", "[1] one a", "[1] two", "[2] two"]


def test_generate_options(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    sampling = ["--max-tokens", "5", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--seed", "7"]
    ending = ["--stop", "x", "--stop", "y", "--ignore-eos", "--raw"]
    engine = ["--eager", "--dtype", "bfloat16", "--page-size", "32", "--max-num-seqs", "2", "--backend", "reference"]
    assert main(["generate", "folder", "hi", *sampling, *ending, *engine, "--report"]) == 0
    (call,) = llm.calls
    params = call.params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p, params.seed) == (5, 0.5, 3, 0.9, 7)
    assert (params.stop, params.ignore_eos, call.chat) == (("x", "y"), True, False)
    assert call.model == "folder"
    assert call.options == {
        "backend": "reference",
        "compile": False,
        "dtype": torch.bfloat16,
        "page_size": 32,
        "max_num_seqs": 2,
    }
    assert capsys.readouterr().err == "the report\nthe timings\n"


def test_user_mistake_exits_2(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "demo", "hi", "--top-p", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: top_p is 2.0")
    assert llm.calls == []


def test_interrupt_exits_130(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    llm.failure = KeyboardInterrupt()
    assert main(["generate", "demo", "hi"]) == 130
    assert capsys.readouterr() == ("one hi", "\n")


def test_a_failed_answer_is_said_behind_the_others(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    llm.failure = RequestFailed("the largest of its logits is NaN or infinite")
    assert main(["generate", "demo", "a", "b"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == ["[1] one a", "[2] one b"]
    assert err == "error: the largest of its logits is NaN or infinite\n"


def test_letters_that_a_terminal_has_not_are_escaped(llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", "demo", "é"]) == 0
    assert terminal.buffer.getvalue() == b"one \\xe9\ntwo\n"  # type: ignore[attr-defined]


BAD_VALUES = {
    "--max-tokens": ["0", "-1", "x", "1.5", "", "1e3"],
    "--temperature": ["-1", "nan", "inf", "hot", ""],
    "--top-k": ["-1", "x", "1.5"],
    "--top-p": ["0", "1.5", "nan", "-1", "x"],
    "--seed": ["-1", "x", "1.5", "9223372036854775808"],
    "--stop": [""],
    "--max-num-seqs": ["0", "-3", "x", "1000000000000"],
    "--page-size": ["0", "-16", "x", "99999999999"],
    "--backend": ["spda", "", "=", "full_attention=", "=sdpa", "full_atention=sdpa", "full_attention=spda"],
    "--dtype": ["int8", "float64", "", "bf16"],
}


@pytest.mark.parametrize(("option", "value"), [(option, bad) for option, bads in BAD_VALUES.items() for bad in bads])
def test_a_bad_value_exits_2_with_a_paragraph(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["generate", "./no such folder", "hi", f"{option}={value}"])
    except SystemExit as error:  # argparse's
        code = error.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err
    assert "no such folder" not in err, "the option comes before the model"
    assert "Traceback" not in err
    assert len(err) < 1500


@pytest.mark.parametrize("option", ["--html", "--save"])
def test_what_cannot_be_written_exits_2(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert main(["apply", "./no such folder", option, str(tmp_path / "file" / "x")]) == 2
    assert main(["diff", str(tmp_path / "none"), str(tmp_path / "file")]) == 2
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "file"))
    assert main(["apply", "demo"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_other_errors_are_not_hidden(llm: type[FakeLLM]) -> None:
    llm.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["generate", "demo", "hi"])


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([], "auto"),
        (["sdpa"], "sdpa"),
        (["full_attention=sdpa", "conv=reference"], {"full_attention": "sdpa", "conv": "reference"}),
    ],
)
def test_parse_backend(choices: list[str], expected: str | dict[str, str]) -> None:
    assert parse_backend(choices) == expected


@pytest.mark.parametrize("choices", [["a", "b"], ["a", "conv=b"], ["conv="], ["=sdpa"]])
def test_parse_backend_refuses(choices: list[str]) -> None:
    with pytest.raises(OptionError, match="ambiguous"):
        parse_backend(choices)


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["generate"], ["generate", "demo"], ["apply", "demo", "--dtype", "int3"]]
)
def test_wrong_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert "usage: autodeploy" in capsys.readouterr().err


def test_unknown_model_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", "./no-such-folder"]) == 2
    assert "'./no-such-folder' is not a folder" in capsys.readouterr().err


def test_save_refuses_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["apply", "demo", "--save", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def _known(listing: str) -> list[str]:
    """The first word of each line that `listing` prints."""
    known_backends = [b.kind for kind in kinds() for b in backends() if b.kind == kind.name]
    return {
        "passes": [step.name for step in default()],
        "fields": ["name", *(field.name for field in catalogue())],
        "kinds": ["name", *(kind.name for kind in kinds())],
        "backends": ["kind", *known_backends],
    }[listing]


@pytest.mark.parametrize("listing", ["passes", "fields", "kinds", "backends"])
def test_listings(listing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([listing]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if not line.startswith(" ")]  # what does not fit goes on below, indented
    assert [line.split()[0] for line in rows] == _known(listing)
    assert all(len(line.split()) > 2 for line in rows), "a line without a meaning"


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert f"{tmp_path} (no models yet)" in out
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    for kind in kinds():
        heading = lines.index([kind.name, "in float32 on cpu"])
        listed = [b for b in backends() if b.kind == kind.name]
        states = dict(lines[heading + 1 : heading + 1 + len(listed)])
        assert list(states) == [b.name for b in listed]
        assert states["reference"] == "works"
        for_gpus = [name for name, state in states.items() if "GPU" in state]
        assert for_gpus[:1] == [listed[0].name][: len(for_gpus)]


def test_reader_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(text: str) -> int:
        raise BrokenPipeError

    with (tmp_path / "stdout").open("w") as file:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=refuse, fileno=file.fileno))
        assert main(["fields"]) == 141
