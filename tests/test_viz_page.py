"""The page as a file: small, on its own, and with nothing in it that a browser could take for markup."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import failed_trace, hostile_diff, large_diff, pipeline_trace, small_diff
from viz_graphs import attention_layer, cached_layer, layers

import autodeploy as ad
from autodeploy.app.cli import main
from autodeploy.errors import OptionError, PassError
from autodeploy.viz import GraphDiff, Trace
from autodeploy.viz.page import SCRIPTS, render_page
from autodeploy.viz.page_data import page_data
from autodeploy.viz.palette import COLORS, variables

STATIC = Path(ad.__file__).parent / "viz" / "static"
TEXT = {"light": "#111827", "dark": "#f3f4f6"}


def data_of(page: str) -> Any:
    found = re.search(r'<script id="data" type="text/plain">([A-Za-z0-9+/=]*)</script>', page)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


@pytest.mark.parametrize("make", [pipeline_trace, failed_trace, hostile_diff, small_diff])
def test_page_holds_its_data(make) -> None:
    shown = make()
    assert data_of(render_page(shown)) == json.loads(json.dumps(page_data(shown)))


def test_only_its_own_script_and_style_run() -> None:
    page = render_page(hostile_diff(), title="<script>&")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<title>&lt;script&gt;&amp;</title>" in page
    for tag in ("script", "style"):
        text = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert not re.search(r"\b(src|href)=", page)
    assert "innerHTML" not in page


def test_32_layers_are_small() -> None:
    """Every node has two values, of the padded inputs and of the packed ones."""
    assert len(render_page(pipeline_trace(32))) < 400_000


def test_every_node_of_every_graph_is_there() -> None:
    trace = pipeline_trace()
    data = page_data(trace)
    for stage, shown in zip(trace.stages, data["stages"], strict=True):
        names = [data["versions"][index][1] for index in shown["nodes"]]
        assert names == [node.name for node in stage.snapshot.nodes]
    for step in data["steps"]:
        boxed = [item for row in step["tree"] for item in row[3] if item >= 0]
        assert len(boxed) == len(set(boxed))
    assert [(step["first"], step["last"]) for step in data["steps"][:3]] == [(0, len(trace.stages) - 1), (0, 1), (1, 2)]


def test_same_page_each_time() -> None:
    assert render_page(small_diff()) == render_page(small_diff())


def test_pairs_are_one_node() -> None:
    data = page_data(small_diff())
    ids = [{data["places"][data["versions"][index][0]] for index in stage["nodes"]} for stage in data["stages"]]
    assert len(ids[0] & ids[1]) == 11
    assert len(ids[0] | ids[1]) == 23


def test_large_graphs_are_made_quickly_and_small() -> None:
    assert len(render_page(large_diff(10_000))) < 1_000_000


def test_saving(tmp_path: Path) -> None:
    diff = small_diff()
    diff.save(tmp_path / "diff.html")
    assert (tmp_path / "diff.html").read_text() == render_page(diff)
    trace = pipeline_trace()
    trace.save(tmp_path / "trace.html")
    assert (tmp_path / "trace.html").read_text() == render_page(trace)
    for ending, start in {"svg": "<svg ", "json": "{", "txt": "start -> "}.items():
        trace.save(tmp_path / f"trace.{ending}")
        assert (tmp_path / f"trace.{ending}").read_text().startswith(start)
    for shown in (diff, trace, diff.before):
        for name in ("x.htm", "x", "x.png"):
            with pytest.raises(OptionError, match=rf"cannot save .* as '{name}'"):
                shown.save(tmp_path / name)
            assert not (tmp_path / name).exists()


def test_notebooks_show_the_page_of_a_trace() -> None:
    frame = failed_trace()._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in frame


def test_command_line(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, layer in zip(paths, (attention_layer, cached_layer), strict=True):
        ad.diff(layers(2, layer), layers(2, layer)).after.save(path)
    page = tmp_path / "out.html"
    assert main(["diff", *map(str, paths), "--html", str(page)]) == 1
    assert data_of(page.read_text())["schema"] == "autodeploy.page/2"


def test_apply_keeps_its_history() -> None:
    from tiny_models import tiny

    gm = ad.trace(tiny("llama"))
    assert ad.apply(gm).trace is None
    result = ad.apply(gm, recorder=ad.Recorder())
    assert isinstance(result.trace, Trace)
    assert [stage.name for stage in result.trace.stages] == [
        "start",
        *(record.name for record in result.report.passes),
    ]
    shown = (result, result.report, result.trace, ad.diff(gm, result.module), result.trace.stages[0].snapshot)
    for each in shown:
        assert "\n" not in repr(each)
        assert len(repr(each)) < 300
    assert "<iframe " in result._repr_html_()
    assert "<pre>" in ad.apply(gm).report._repr_html_()
    diff = ad.diff(gm, result.module)
    assert isinstance(diff, GraphDiff)
    assert not diff.is_empty


def test_a_pass_that_raises_leaves_its_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `apply` with a recorder, and of the command line."""
    from tiny_models import tiny

    from autodeploy.app import models
    from autodeploy.compiler import apply as backend

    def fail(self: object, gm: object) -> int:
        raise RuntimeError("no more")

    gm = ad.trace(tiny("llama"))
    steps = backend.resolve_passes(["canonicalize", "find_attention"])
    monkeypatch.setattr(type(steps[1]), "apply", fail)
    recorder = ad.Recorder()
    with pytest.raises(PassError, match="no more"):
        ad.apply(gm, recorder=recorder)
    assert [bool(stage.error) for stage in recorder.trace().stages] == [False, False, True]
    monkeypatch.setattr(models, "resolve_model", lambda name: name)
    monkeypatch.setattr(models, "load_model", lambda name, dtype: (tiny("llama"), None))
    page = tmp_path / "page.html"
    assert main(["apply", "tiny", "--html", str(page)]) == 2
    assert "no more" in data_of(page.read_text())["stages"][-1]["error"]


def luminance(color: str) -> float:
    """Relative luminance: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("kind", COLORS)
def test_text_is_readable_on_every_colour(kind: str) -> None:
    color = COLORS[kind]
    assert contrast(TEXT["light"], color.fill) > 7
    assert contrast(TEXT["dark"], color.dark_fill) > 7
    assert [variables(dark)["text"] for dark in (False, True)] == list(TEXT.values())


def test_scripts_are_small_and_listed() -> None:
    files = {path.stem: len(path.read_text().splitlines()) for path in STATIC.glob("*.js")}
    assert files.keys() == {*SCRIPTS, "paper"}
    assert max(files.values()) <= 400
    assert all(len(line) <= 120 for path in STATIC.glob("*.js") for line in path.read_text().splitlines())
