"""The gate: exit codes, conditions, expected summaries, and the helper for tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import fx, nn
from traces import before as before_pass
from viz_graphs import Maker, aten, attention_layer, cached_layer, graph_module, layers

from autodeploy.app import models
from autodeploy.app.cli import main
from autodeploy.compiler import pipeline
from autodeploy.graph.meta import ROLE
from autodeploy.viz import Recorder, Snapshot, assert_graph_diff
from autodeploy.viz.duplicates import duplicate_metadata
from passes import ShareMetadata


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A graph with attention and one with two matmuls instead, saved."""
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, layer in zip(paths, (attention_layer, cached_layer), strict=True):
        Snapshot.of(layers(3, layer), path.stem).save(path)
    return [str(path) for path in paths]


LINE = "3 x layers.*.attn: - scaled_dot_product_attention, + 2 matmul, softmax"


def test_same_graphs_exit_0_and_say_nothing(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", files[0], files[0]]) == 0
    assert capsys.readouterr() == ("", "")


def test_different_graphs_exit_1(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *files]) == 1
    out, err = capsys.readouterr()
    assert "before -> after: 14 -> 20 nodes" in out
    assert err == "the graphs differ\n"


@pytest.mark.parametrize(
    ("condition", "code"),
    [("added", 1), ("removed", 1), ("shape,dtype", 0), ("duplicate-metadata", 0), ("dtype,added", 1)],
)
def test_conditions(condition: str, code: int, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *files, "--fail-on", condition]) == code
    assert capsys.readouterr().err.startswith(f"{condition.rpartition(',')[2]}: ") == bool(code)


@pytest.mark.parametrize(("value", "condition"), [(torch.ones(2, 4), "shape"), (torch.ones(2, 3).half(), "dtype")])
def test_values(value: torch.Tensor, condition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, made in (("a", torch.ones(2, 3)), ("b", value)):
        graph = graph_module(lambda make, x, made=made: make.call(aten.sin.default, x, value=made))
        Snapshot.of(graph).save(tmp_path / f"{name}.json")
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    assert main(["diff", *paths, "--fail-on", "shape,dtype"]) == 1
    assert capsys.readouterr().err == f"{condition}: sin_default\n"
    assert main(["diff", *paths, "--fail-on", "shape" if condition == "dtype" else "dtype"]) == 0


def test_expected_summary(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *files, "--summary"]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["lines"] == [LINE]
    expected = tmp_path / "summary.json"
    expected.write_text(json.dumps(summary))
    assert main(["diff", *files, "--expect", str(expected)]) == 0
    assert main(["diff", files[0], files[0], "--expect", str(expected)]) == 1
    assert f'-  "{LINE}"' in capsys.readouterr().err.splitlines()


def test_ignoring(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    for path, name in zip(paths, ("sin", "sine"), strict=True):
        gm = graph_module(lambda make, x: make.call(aten.sin.default, x))
        gm.graph.find_nodes(op="call_function", target=aten.sin.default)[0].name = name
        Snapshot.of(gm).save(path)
    assert main(["diff", *paths]) == 1
    assert main(["diff", *paths, "--ignore", "names,order"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-on", "adde"], "unknown condition 'adde'"),
        (["--ignore", "nothing"], "unknown thing to ignore 'nothing'"),
        (["--expect", "missing.json"], "cannot read missing.json"),
        (["--save", "diff.png"], "cannot save a GraphDiff as 'diff.png'"),
    ],
)
def test_mistakes_exit_2(
    arguments: list[str], message: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", *files, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", '{"schema": "other"}', "not json", '{"schema": "autodeploy.diff/1"}']
)
def test_files_that_are_no_graphs_exit_2(
    content: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(content)
    for name in ("other.json", "missing.json", "missing.pt2"):
        assert main(["diff", files[0], str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\3\4junk"])
def test_damaged_programs_exit_2(
    content: bytes, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.pt2").write_bytes(content)
    assert main(["diff", files[0], str(tmp_path / "damaged.pt2")]) == 2
    assert "damaged.pt2" in capsys.readouterr().err


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values in JSON data are, but for literals of the graph, which may be anything."""
    yield path
    for key, item in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if key != "arguments":
            yield from _places(item, (*path, key))


def test_every_damage_exits_2(files: list[str], tmp_path: Path) -> None:
    """Each value of a saved graph and of a saved trace in turn is one of another sort."""
    with Recorder() as recorder:
        recorder.before(ShareMetadata(), layers(1, attention_layer))
    Snapshot.of(layers(1, attention_layer)).save(tmp_path / "snapshot.json")
    recorder.trace().save(tmp_path / "trace.json")
    tried = 0
    for name in ("snapshot.json", "trace.json"):
        whole = json.loads((tmp_path / name).read_text())
        for *path, last in list(_places(whole))[1:]:
            damaged = json.loads((tmp_path / name).read_text())
            holder = functools.reduce(lambda data, key: data[key], path, damaged)
            if last in _NOT_READ:
                continue
            holder[last] = [[None]] if not isinstance(holder[last], list) else 3
            (tmp_path / "damaged.json").write_text(json.dumps(damaged))
            assert main(["diff", files[0], str(tmp_path / "damaged.json")]) == 2, (*path, last)
            tried += 1
    assert tried > 100


_NOT_READ = ("title", "matches", "seconds", "error")  # shown as they are


@pytest.mark.filterwarnings("ignore")  # torch.export warns of its own parts
def test_exported_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, activation in (("a", nn.ReLU()), ("b", nn.GELU())):
        model = nn.Sequential(nn.Linear(4, 4), activation)
        torch.export.save(torch.export.export(model, (torch.ones(2, 4),)), tmp_path / f"{name}.pt2")
    assert main(["diff", str(tmp_path / "a.pt2"), str(tmp_path / "a.pt2")]) == 0
    assert main(["diff", str(tmp_path / "a.pt2"), str(tmp_path / "b.pt2")]) == 1
    assert "- relu, + gelu" in capsys.readouterr().out


def test_traces_stand_for_their_last_graph(files: list[str], tmp_path: Path) -> None:
    gm = layers(3, attention_layer)
    with Recorder() as recorder:
        recorder.before(ShareMetadata(), gm)
    recorder.trace().save(tmp_path / "trace.json")
    assert main(["diff", files[0], str(tmp_path / "trace.json")]) == 0


def test_what_apply_saves_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole trace as a page again, and two of its stages compared by exact links."""
    monkeypatch.setattr(models, "resolve_model", lambda name: name)
    monkeypatch.setattr(models, "load_model", lambda name, dtype: (tiny("llama"), None))
    assert main(["apply", "tiny", "--save", str(tmp_path)]) == 0
    trace = str(tmp_path / "trace.json")
    assert main(["diff", trace, "--html", str(tmp_path / "page.html"), "--save", str(tmp_path / "x.svg")]) == 0
    assert "share_metadata" in (tmp_path / "page.html").read_text()[:400] + capsys.readouterr().out
    assert main(["diff", f"{trace}@insert_cached_attention", f"{trace}@share_metadata"]) == 1
    assert "became one node of" in capsys.readouterr().out
    assert main(["diff", f"{trace}@share_metadta", trace]) == 2
    assert "did you mean 'share_metadata'" in capsys.readouterr().err


def test_one_graph_alone_is_no_difference(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", files[0]]) == 2
    assert "name another one" in capsys.readouterr().err
    assert main(["diff", f"{files[0]}@start", files[1]]) == 2
    assert "has no stages" in capsys.readouterr().err


def test_saved_files(files: list[str], tmp_path: Path) -> None:
    for ending in ("svg", "json"):
        assert main(["diff", *files, "--fail-on", "shape", "--save", str(tmp_path / f"diff.{ending}")]) == 0
        assert (tmp_path / f"diff.{ending}").exists()


def test_assert_graph_diff() -> None:
    before, after = layers(3, attention_layer), layers(3, cached_layer)
    diff = assert_graph_diff(
        before,
        after,
        f"""
        {LINE}
    """,
    )
    assert len(diff.changed) == 3
    assert_graph_diff(before, before, "")
    with pytest.raises(AssertionError, match="the graphs do not differ as expected") as caught:
        assert_graph_diff(before, after, "3 x layers.*.attn: - softmax")
    assert f"+{LINE}" in str(caught.value)


def repeated(number: int) -> fx.GraphModule:
    def build(make: Maker, layout: fx.Node) -> fx.Node:
        ROLE.set(layout, "layout")
        sums = [make.call(aten.cumsum.default, layout, 0) for _ in range(number)]
        return make.call(aten.cat.default, sums)

    return graph_module(build, inputs=["layout"])


def test_duplicates_are_found_in_metadata_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert duplicate_metadata(Snapshot.of(repeated(3))) == [("cumsum_default", "cumsum_default_1", "cumsum_default_2")]
    assert duplicate_metadata(Snapshot.of(repeated(1))) == []
    activations = graph_module(lambda make, x: [make.call(aten.sin.default, x) for _ in range(2)])
    assert duplicate_metadata(Snapshot.of(activations)) == []
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    for path, number in zip(paths, (1, 2), strict=True):
        Snapshot.of(repeated(number)).save(path)
    assert main(["diff", *paths, "--fail-on", "duplicate-metadata"]) == 1
    assert "duplicate-metadata: cumsum_default = cumsum_default_1" in capsys.readouterr().err


def test_no_duplicates_are_left_by_share_metadata() -> None:
    gm = before_pass("share_metadata", "gpt_oss")
    assert len(duplicate_metadata(Snapshot.of(gm))) > 5
    pipeline.run(gm, [ShareMetadata()])
    assert duplicate_metadata(Snapshot.of(gm)) == []
