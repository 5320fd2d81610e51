"""The documentation: its links lead somewhere, its code runs, what is generated is up to date, the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import write_architecture
from tiny_models import tiny

import autodeploy as ad

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))
_LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
_MOST_README_LINES = 150


def blocks(page: Path) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        target = target if target.exists() else target.with_suffix(".md")
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= _MOST_README_LINES


def test_code_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama", 1)
    torch_compile, llm = torch.compile, ad.LLM
    # Inductor and the demo model are tested elsewhere: here the same calls, with a graph that runs as it is.
    monkeypatch.setattr(torch, "compile", lambda model, backend: torch_compile(model, backend=_known(backend)))
    monkeypatch.setattr(ad, "LLM", lambda name: partial(llm, compile=False)(model, _Words()), raising=False)
    names: dict[str, Any] = {"model": model, "input_ids": torch.tensor([[5, 6, 7]])}
    for block in blocks(ROOT / "README.md"):
        exec(block, names)
    assert (tmp_path / "diff.html").exists()
    assert names["result"].report.ledger.prepare_calls == 1


def _known(backend: str) -> str:
    assert backend in torch._dynamo.list_backends()
    return "eager"


class _Words:
    """A tokenizer of words, which are numbers."""

    chat_template = None
    all_special_ids: tuple[int, ...] = ()
    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[len(word) for word in text.split()])

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def test_code_of_extending_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    added: dict[str, Any] = {}
    monkeypatch.setattr("autodeploy.kernels.registry._added", added)
    names: dict[str, Any] = {"ad": ad, "gm": ad.trace(tiny("llama", 1))}
    for block in blocks(DOCS / "extending.md"):
        exec(compile(block, "extending.md", "exec", dont_inherit=True), names)
    assert list(added) == ["attention/mine"]
    products = [record for record in names["result"].report.passes if record.name == "drop_ones"]
    assert products[0].matches > 0


def test_architecture_is_up_to_date() -> None:
    """If not: python tests/write_architecture.py."""
    page = write_architecture.PAGE.read_text()
    assert write_architecture.write(page) == page


def test_measured_is_up_to_date() -> None:
    """If not: python benchmarks/measured.py."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "measured.py"))
    assert script["PAGE"].read_text() == script["write"]()


def test_reference_has_every_public_name() -> None:
    text = (DOCS / "reference" / "python.md").read_text()
    assert set(re.findall(r"^::: autodeploy\.(?:trace\.)?(\w+)$", text, flags=re.MULTILINE)) == {*ad.__all__, "errors"}


def test_decisions_have_an_index() -> None:
    """On top of the page, in the order of the headings: `- [title](#anchor)`."""
    text = (DOCS / "decisions.md").read_text()
    titles = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert re.findall(r"^- \[(.*)\]\(#", text, flags=re.MULTILINE) == titles


def test_examples_that_extend_import_one_module() -> None:
    for example in (ROOT / "examples").glob("write_your_own_*.py"):
        imported = set(re.findall(r"^(?:from|import) (autodeploy[\w.]*)", example.read_text(), flags=re.MULTILINE))
        assert imported == {"autodeploy", "autodeploy.extend"}, example.name


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the site needs the extra docs")
def test_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for name in ("python", "extend", "viz"):
        assert 'class="doc ' in (tmp_path / "reference" / name / "index.html").read_text()
    assert "share_metadata" in (tmp_path / "reference" / "commands" / "index.html").read_text()
