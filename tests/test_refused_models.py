"""What is no model that can be served is refused with a word: objects, names, folders. No folder's code is ever run."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import autodeploy as ad
from autodeploy.app.models import load_model
from autodeploy.errors import AutodeployError, OptionError, UnsupportedFeature

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
FEED_FORWARD = {"intermediate_size": 32}


def config_of(model_type: str, **sizes: Any) -> Any:
    return AutoConfig.for_model(model_type, **(SIZES | sizes))


def on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of("llama", **FEED_FORWARD))


def half_on_meta() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config_of("llama", **FEED_FORWARD))
    model.lm_head.to("meta")
    return model


OBJECTS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "int": lambda: 5,
    "float": lambda: 1.5,
    "bool": lambda: True,
    "bytes": lambda: b"demo",
    "list": lambda: ["demo"],
    "dict": lambda: {},
    "object": object,
    "function": lambda: len,
    "generator": lambda: iter("demo"),
    "Linear": lambda: torch.nn.Linear(2, 2),
    "Module": torch.nn.Module,
    "tensor": lambda: torch.ones(2),
    "state dict": lambda: tiny("llama").state_dict(),
    "class": lambda: LlamaForCausalLM,
    "config": lambda: tiny("llama").config,
    "graph": lambda: torch.fx.symbolic_trace(torch.nn.Linear(2, 2)),
    "inner module": lambda: tiny("llama").model.layers[0],
    "meta": on_meta,
    "half on meta": half_on_meta,
    "without head": lambda: AutoModel.from_config(config_of("llama", **FEED_FORWARD)),
    "classifier": lambda: AutoModelForSequenceClassification.from_config(config_of("llama", **FEED_FORWARD)),
    "masked": lambda: AutoModelForMaskedLM.from_config(config_of("bert", **FEED_FORWARD)),
    "encoder": lambda: AutoModel.from_config(config_of("bert", **FEED_FORWARD)),
    "encoder-decoder": lambda: AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=128)
    ),
    "relative attention of its own": lambda: AutoModelForCausalLM.from_config(
        AutoConfig.for_model("xlnet", vocab_size=128, d_model=16, n_layer=1, n_head=2, d_inner=16)
    ),
    "half": lambda: AutoModelForCausalLM.from_config(config_of("llama", **FEED_FORWARD)).half(),
}
NAMES = (
    "",
    " ",
    ".",
    "..",
    "/",
    "./x",
    "~x",
    "two words",
    "/dev/null",
    "\0",
    "x" * 5000,
    "a/b/c",
    "\ud800",
    "org/",
    "*",
)
NAMES += ("-", "http://x/y", "org/name", "demo/", "Demo", "a//b", "/x\0y", "~/", "..//..")
PATHS = (
    Path("no/such"),
    Path("demo"),
    Path("org/name"),
    Path("/dev/null"),
    Path(__file__),
    Path("x" * 5000),
    Path("\0"),
)


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No terminal to read from, no hub to reach, and a cache that nothing has been put into."""
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    def refuse(name: str, **_: Any) -> None:
        validate_repo_id(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", Asked())
    monkeypatch.setattr("builtins.input", Asked().readline)


class Asked(io.StringIO):
    """A terminal on which somebody would say yes, if he was asked."""

    def readline(self, *args: Any) -> str:
        raise AssertionError("it asks")

    read = readline  # type: ignore[assignment]


def refuse(model: Any) -> AutodeployError:
    with pytest.raises(AutodeployError) as caught:
        ad.LLM(model, compile=False)
    assert caught.value.what
    return caught.value


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_object_is_refused(make: Callable[[], Any]) -> None:
    refuse(make())


@pytest.mark.parametrize("name", [*NAMES, *PATHS], ids=lambda name: ascii(str(name))[:20])
def test_name_is_refused(name: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    AutoModelForCausalLM.from_config(config_of("llama", **FEED_FORWARD)).save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def write(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def settings(file: str = "config.json", **changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        old = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(old | changes))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        loaded = load_file(folder / "model.safetensors")
        change(loaded)
        save_file(loaded, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def quantized(method: Any) -> Callable[[Path], Any]:
    return settings(quantization_config={"quant_method": method, "bits": 4, "group_size": 128})


def as_folder(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def transpose(loaded: dict[str, torch.Tensor]) -> None:
    loaded["model.layers.0.mlp.up_proj.weight"] = torch.ones(5, 7)


def to_integers(loaded: dict[str, torch.Tensor]) -> None:
    loaded.update({name: weight[:3] for name, weight in loaded.items()})


REMOTE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tok", None]}
FOLDERS: dict[str, Callable[[Path], Any]] = {
    "config: absent": remove("config.json"),
    "config: empty": write("config.json", ""),
    "config: half": write("config.json", "{"),
    "config: a list": write("config.json", "[]"),
    "config: null": write("config.json", "null"),
    "config: a number": write("config.json", "5"),
    "config: no type": write("config.json", "{}"),
    "config: binary": write("config.json", b"\xff\xfe\x00\x01"),
    "config: deep": write("config.json", "[" * 100_000),
    "config: a folder": as_folder("config.json"),
    "config: type unknown": settings(model_type="unheard_of"),
    "config: type a number": settings(model_type=5),
    "config: type null": settings(model_type=None),
    "config: another type": settings(model_type="gpt2"),
    "config: an encoder": settings(model_type="clip"),
    "config: words for a size": settings(hidden_size="many"),
    "config: negative size": settings(hidden_size=-32),
    "config: no heads": settings(num_attention_heads=0),
    "config: larger": settings(hidden_size=64),
    "config: more layers": settings(num_hidden_layers=2),
    "config: more tokens": settings(vocab_size=200),
    "config: activation unknown": settings(hidden_act="swosh"),
    "config: rope unknown": settings(rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}),
    "config: dtype unknown": settings(dtype="float13"),
    "weights: absent": remove("model.safetensors"),
    "weights: empty": write("model.safetensors", b""),
    "weights: broken": write("model.safetensors", b"broken"),
    "weights: no header": write("model.safetensors", b"\xff" * 64),
    "weights: cut off": lambda f: write("model.safetensors", (f / "model.safetensors").read_bytes()[:-100])(f),
    "weights: a folder": as_folder("model.safetensors"),
    "weights: none inside": weights(dict.clear),
    "weights: one missing": weights(lambda loaded: loaded.pop("model.norm.weight")),
    "weights: one wrong shape": weights(transpose),
    "weights: all wrong shapes": weights(to_integers),
    "weights: pickled only": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "weights: under another name": lambda f: (f / "model.safetensors").rename(f / "other.safetensors"),
    "shards: missing": lambda f: (
        (f / "model.safetensors").rename(f / "other.safetensors"),
        write("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')(f),
    ),
    "shards: broken index": lambda f: (
        (f / "model.safetensors").rename(f / "other.safetensors"),
        write("model.safetensors.index.json", "{")(f),
    ),
    "tokenizer: empty": write("tokenizer.json", ""),
    "tokenizer: half": write("tokenizer.json", "{"),
    "tokenizer: a list": write("tokenizer.json", "[]"),
    "tokenizer: nothing in it": write("tokenizer.json", "{}"),
    "tokenizer: binary": write("tokenizer.json", b"\xff\xfe\x00"),
    "tokenizer: type unknown": write("tokenizer.json", '{"version": "1.0", "model": {"type": "Own"}}'),
    "tokenizer: broken config": write("tokenizer_config.json", "{"),
    **{f"quantized: {method}": quantized(method) for method in ("gptq", "awq", "bitsandbytes", "fp8", "hqq", "own", 5)},
    "quantized: compressed": quantized("compressed-tensors"),
    "quantized: without a method": settings(quantization_config={"bits": 4}),
    "quantized: a word": settings(quantization_config="gptq"),
    "quantized: inside": settings(text_config={"quantization_config": {"quant_method": "gptq"}}),
    "code: type unknown": settings(model_type="own", auto_map=REMOTE),
    "code: no type": lambda f: write("config.json", json.dumps({"auto_map": REMOTE}))(f),
    "code: elsewhere": settings(model_type="own", auto_map={"AutoConfig": "org/name--own.Config"}),
    "code: a kernel on the hub": settings(attn_implementation="org/kernel"),
    "code: another kernel": settings(_attn_implementation="org/kernel"),
    "code: experts": settings(text_config={"experts_implementation": "org/kernel"}),
    "code: of the tokenizer": settings("tokenizer_config.json", tokenizer_class="Own", auto_map=REMOTE),
}  # fmt: skip


def test_there_are_many() -> None:
    assert len(OBJECTS) + len(NAMES) + len(PATHS) + len(FOLDERS) >= 65


@pytest.mark.parametrize("spoil", FOLDERS.values(), ids=FOLDERS)
def test_folder_is_refused(folder: Path, spoil: Callable[[Path], Any]) -> None:
    mark = folder.parent / "it ran"
    write("own.py", f"open({str(mark)!r}, 'w')\n")(folder)
    spoil(folder)
    assert str(folder) in refuse(folder).where
    assert not mark.exists()


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith("code")])
def test_code_of_a_folder_is_refused_with_a_word(folder: Path, name: str) -> None:
    FOLDERS[name](folder)
    assert "never run" in str(refuse(str(folder)))


def test_code_beside_a_known_type_is_not_run(folder: Path) -> None:
    mark = folder.parent / "it ran"
    write("own.py", f"open({str(mark)!r}, 'w')\n")(folder)
    settings(auto_map=REMOTE)(folder)
    model, tokenizer = load_model(folder)
    assert type(model) is LlamaForCausalLM
    assert tokenizer is not None
    assert not mark.exists()


def test_an_attention_that_is_not_installed_is_not_asked_for(folder: Path) -> None:
    settings(attn_implementation="flash_attention_2")(folder)
    assert load_model(folder)[0].config._attn_implementation == "eager"


def test_a_path_is_taken(folder: Path) -> None:
    llm = ad.LLM(folder, compile=False)
    assert len(llm.generate("a b", ad.SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_weights_that_nothing_uses_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(lambda loaded: loaded.update(extra=torch.ones(2)))(folder)
    load_model(folder)
    assert "1 weights in" in capsys.readouterr().err


def test_a_dtype_for_a_loaded_model_is_refused() -> None:
    with pytest.raises(OptionError, match=r"for a model that is loaded\n.*model.to"):
        ad.LLM(tiny("llama"), dtype=torch.float32)


def test_packed_weights_are_refused(folder: Path) -> None:
    FOLDERS["quantized: gptq"](folder)
    with pytest.raises(UnsupportedFeature, match="quantized by 'gptq'"):
        load_model(folder)
