"""Every example runs as its reader would run it, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import VOCAB_SIZE, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]


def run_example(name: str, *args: str, cache: Path) -> str:
    """What the example prints."""
    command = [sys.executable, "-m", f"examples.{name}", *args]
    environment = os.environ | {"AUTODEPLOY_CACHE": str(cache)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_example_is_tested() -> None:
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == {"quickstart", "write_your_own_pass", "write_your_own_backend", "write_your_own_kind"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer that knows a few words."""
    target = tmp_path / "tiny-llama"
    tiny("llama").save_pretrained(target)
    words = {f"word{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)
    return target


def test_quickstart(folder: Path, tmp_path: Path) -> None:
    printed = run_example("quickstart", str(folder), "word5 word6 word7", cache=tmp_path / "cache")
    assert "time to first token" in printed
    assert "3 tokens in:" in printed
    assert "4 cached attention nodes" in printed
    assert "self.prepare_metadata(layout" in printed


def test_write_your_own_pass(tmp_path: Path) -> None:
    printed = run_example("write_your_own_pass", cache=tmp_path)
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("fold_weights")]
    # Six norms in each of two layers (query and key have their own), and the last one.
    assert row[1] == "13"


def test_write_your_own_backend(tmp_path: Path) -> None:
    printed = run_example("write_your_own_backend", cache=tmp_path)
    dense, reference = printed.splitlines()
    assert "nodes_naive=44, nodes_shared=20" in dense
    assert dense.split(" Ledger")[0].removeprefix("dense") == reference.split(" Ledger")[0].removeprefix("reference")


def test_write_your_own_kind(tmp_path: Path) -> None:
    """It compares its own answers, chunked and preempted, beside an attention layer."""
    assert "2 cached attention nodes" in run_example("write_your_own_kind", cache=tmp_path)
