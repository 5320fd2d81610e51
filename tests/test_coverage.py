"""What becomes of each layer of a model: served, with caches and fields, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoConfig

from autodeploy.app import coverage_zoo
from autodeploy.app.cli import main
from autodeploy.app.coverage import coverage
from autodeploy.app.coverage_text import coverage_lines, markdown
from autodeploy.app.tiny import MOST_LAYERS, tiny_config, tiny_model
from autodeploy.errors import OptionError, TraceError, UnknownName


def test_two_kinds_in_one_model() -> None:
    found = coverage("lfm2", backend="reference")
    conv, attention = found.layers[:2]
    assert found.refusal is None
    assert [layer.kind for layer in found.layers] == ["causal_conv1d", "attention"] * 2
    assert [(cache.name, cache.owner, cache.num_bytes) for cache in conv.caches] == [("conv_state", "sequence", 512)]
    assert (attention.num_bytes("token"), attention.num_bytes("sequence")) == (2 * 2 * 16 * 4, 0)
    assert conv.fields == ("cu_seqlens_q", "has_initial_state", "state_slots")
    assert attention.fields == ("block_table", "cu_seqlens_q", "seq_lens", "slot_mapping")
    assert found.ledger is not None
    assert found.ledger.attention_nodes == 4


def test_layers_that_read_the_caches_of_others() -> None:
    layers = coverage(tiny_models.tiny("gemma4_text")).layers
    assert [layer.caches_of for layer in layers] == ["", "", layers[0].path, layers[1].path]
    assert [layer.num_bytes("token") > 0 for layer in layers] == [True, True, False, False]


def test_layers_without_a_backend_say_why() -> None:
    found = coverage("gemma2", backend="flashinfer", dtype=torch.float16)
    assert found.refusal is not None
    assert [layer.refusal is not None for layer in found.layers] == [True] * 4
    assert "no backend can run this attention" in "\n".join(coverage_lines(found))


def test_a_model_that_is_not_traced_says_why() -> None:
    found = coverage("xlnet")
    assert found.layers == ()
    assert found.refusal is not None
    assert found.refusal.error == "NoAttentionFound"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    """Of a size that no test could compute with."""
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 2}
    AutoConfig.for_model("qwen2", **sizes, dtype=torch.bfloat16).save_pretrained(tmp_path)
    layers = coverage(str(tmp_path)).layers
    assert [layer.num_bytes("token") for layer in layers] == [2 * 8 * 128 * 2] * 2


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(UnknownName, match="did you mean 'llama'"):
        coverage("lama")
    with pytest.raises(UnknownName, match="unknown backend"):
        coverage("llama", backend="fast")


def test_tiny_shows_every_sort_of_layer() -> None:
    assert set(tiny_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}
    assert tiny_config("gemma3_text", num_layers=1).num_hidden_layers == 2 <= MOST_LAYERS
    with pytest.raises(TraceError, match="no tiny model"):
        tiny_model("reformer")


def test_table_of_alike_layers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["coverage", "gpt2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gpt2: served")
    assert lines[2].split() == ["4", "x", "transformer.h.*.attn", "attention", "full", "sdpa", "512", "-"]


def test_nothing_to_cover(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage"]) == 2
    assert main(["coverage", "--zoo", "--page-size", "8"]) == 2
    assert "--page-size with --zoo" in capsys.readouterr().err


def test_zoo_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One type in a process, one out of time, one that an earlier run has left, and a line that was cut off."""
    results, page = tmp_path / "zoo.jsonl", tmp_path / "zoo.md"
    results.write_text(json.dumps(coverage("gpt2").to_json()) + '\n{"model": "op')
    options = ["--zoo", "--results", str(results), "--markdown", str(page)]
    assert main(["coverage", "gpt2", "opt", *options]) == 0
    assert "opt: 4 layers" in capsys.readouterr().err
    assert main(["coverage", "gpt2", "opt", "llama", *options, "--limit", "0.01"]) == 1
    assert "1/3" not in (printed := capsys.readouterr()).err
    assert printed.out == "3 types, 2 served\n"
    text = page.read_text()
    assert "| gpt2 | 4 x attention, full | sdpa | 512 | - |" in text
    assert "| llama | TimeLimit: not done in 0.01 s |" in text


def test_json_is_read_back() -> None:
    found = coverage("qwen2")
    read = coverage_zoo.from_json(json.loads(json.dumps(found.to_json())))
    assert read.layers == found.layers
    assert markdown([read]) == markdown([found])


def test_unknown_types_are_refused_before_any_is_run(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown model type"):
        coverage_zoo.cover_types(["llama", "lama"], tmp_path / "zoo.jsonl", 1.0, print)


def test_options_are_checked_first() -> None:
    with pytest.raises(OptionError, match="page_size"):
        coverage("llama", page_size=0)
