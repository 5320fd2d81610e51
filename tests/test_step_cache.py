"""Kept steps: right and warm, or made anew with a word; never another model's, nor anybody else's."""

from __future__ import annotations

import copy
import io
import json
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import check_greedy
from tiny_models import VOCAB_SIZE, tiny
from torch import fx, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodeploy as ad
from autodeploy.inductor import step_cache, step_files
from autodeploy.inductor.lower import Lowered, hashes
from autodeploy.inductor.step_cache import load_or_make
from autodeploy.inductor.step_files import StepFolder
from passes import default

# Inductor loads a module of torch's that warns about torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

GREEDY = ad.SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8], [9] * 20]


def glm(seed: int | None) -> PreTrainedModel:
    """Two layers of experts, whose routers' biases are buffers: zeros when fresh, others by `seed`, as rotations."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
    config = AutoConfig.for_model("glm4_moe", **sizes, **heads, **experts, n_group=1, topk_group=1)
    torch.manual_seed(seed or 0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(4) * 2 if seed is not None else torch.zeros(4))
            elif name.endswith("inv_freq"):  # of which prepare_metadata makes the rotary tables
                tensor.mul_(1 + (seed or 0))
            elif tensor.dim() > 1:
                tensor.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the step of a fresh model of `glm`, and what was set in the environment meanwhile."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTODEPLOY_CACHE", str(path))
        before, putenv, changes = dict(os.environ), os.putenv, []

        def recorded(name: bytes, value: bytes) -> None:
            changes.append((os.fsdecode(name), os.fsdecode(value)))
            putenv(name, value)

        patch.setattr(os, "putenv", recorded)
        assert not ad.LLM(glm(None)).timings.is_warm
        # Torch sets these itself, the folder to where it is by default, in whatever it compiles.
        own = {"_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "TORCHINDUCTOR_CACHE_DIR"}
        assert {name for name, value in changes if before.get(name) != value} <= own
        assert before.get("TORCHINDUCTOR_CACHE_DIR") in (None, os.environ["TORCHINDUCTOR_CACHE_DIR"])
        yield path


@pytest.fixture(scope="module")
def data(kept: Path) -> bytes:
    """What was kept."""
    return steps(kept / "steps")[0].read_bytes()


def steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if "-" in path.name and not path.name.startswith("."))


def edited(data: bytes, without: str = "nothing", **changes: Any) -> bytes:
    """A kept step with `changes` in its JSON, and without the files whose names end in `without`."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(file, "w") as copied:
        for name in archive.namelist():
            part = archive.read(name)
            if name == "step.json":
                part = json.dumps(json.loads(part) | changes).encode()
            if not name.endswith(without):
                copied.writestr(name, part)
    return file.getvalue()


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_another_checkpoint_is_warm_and_right(seed: int | None, kept: Path) -> None:
    model = glm(seed)
    llm = ad.LLM(model)
    assert llm.timings.is_warm
    assert llm.timings.trace == 0
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        check_greedy(model, prompt, output.token_ids)


@dataclass
class Runs:
    """Looks for steps of models, whose making is pretended."""

    folder: Path
    lowered: Lowered
    words: list[str] = field(default_factory=list)
    num_traced: int = 0
    num_made: int = 0

    def run(self, model: nn.Module, *passes: Any) -> bool:
        """Whether the step was there."""

        def trace() -> fx.GraphModule:
            self.num_traced += 1
            return traced(model)

        return load_or_make(self.folder, model, passes or default(), trace, self._make, self.words.append)[1]

    def _make(self, gm: fx.GraphModule) -> Lowered:
        self.num_made += 1
        return self.lowered

    @property
    def steps(self) -> list[Path]:
        return steps(self.folder)


@pytest.fixture
def runs(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Without steps so far."""
    step_cache._say_not_kept.cache_clear()
    monkeypatch.setattr(Lowered, "save", lambda self: edited(data, looked_at=self.looked_at))
    return Runs(tmp_path / "cache" / "steps", Lowered.load(data, tmp_path))


@cache
def traced(model: nn.Module) -> fx.GraphModule:
    return ad.trace(model)  # type: ignore[arg-type]


LLAMA = tiny("llama", 1)


def llama() -> PreTrainedModel:
    return copy.deepcopy(LLAMA)


def test_a_stock_model_is_found_without_tracing(runs: Runs) -> None:
    assert [runs.run(LLAMA) for _ in range(3)] == [False, True, True]
    assert (runs.num_traced, runs.num_made, runs.words) == (1, 1, [])


def test_any_other_model_is_found_by_its_graph(runs: Runs) -> None:
    def with_a_buffer() -> PreTrainedModel:
        model = llama()
        model.register_buffer("nobody_reads_it", torch.ones(3))
        model.forward = model.forward
        return model

    assert [runs.run(model) for model in (LLAMA, with_a_buffer(), with_a_buffer())] == [False, True, True]
    assert (runs.num_traced, runs.num_made) == (3, 1)


def test_a_step_that_calls_methods_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends in plain torch do, and torch keeps only what it knows to call methods of tensors."""
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
    ad.LLM(tiny("lfm2", 2), max_num_seqs=2, max_model_len=64).generate([[5, 6, 7]], GREEDY)
    assert len(steps(tmp_path / "steps")) == 1


def test_a_model_with_a_hook_answers_for_itself_alone(runs: Runs) -> None:
    def hooked() -> PreTrainedModel:
        model = llama()
        model.model.norm.register_forward_hook(lambda module, args, output: output * 2)
        return model

    models = [hooked(), LLAMA, hooked(), LLAMA]
    assert [runs.run(model) for model in models] == [False, False, True, True]
    assert runs.num_made == 2


def test_values_that_were_looked_at_are_compared(runs: Runs) -> None:
    models = [llama(), llama()]
    with torch.no_grad():
        models[1].model.norm.weight.mul_(2)
    seen = []
    for model in (*models, *models):
        values = {"model.norm.weight": model.model.norm.weight}
        runs.lowered = replace(runs.lowered, looked_at=hashes(values))
        seen.append(runs.run(model))
    assert seen == [False, False, True, True]
    assert len(runs.steps) == 2
    assert [word for word in runs.words if "other values" in word]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def emptied(data: bytes) -> bytes:
    return b""


def flipped(data: bytes) -> bytes:
    """One bit of a library, which the linker would have taken."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = next(entry.header_offset for entry in archive.infolist() if entry.filename.endswith(".so"))
    return data[: start + 2000] + bytes([data[start + 2000] ^ 1]) + data[start + 2001 :]


@pytest.mark.parametrize(
    "damage",
    [cut, emptied, flipped, *(partial(edited, without=part) for part in ("step.json", "mixed.bin", ".pt", ".so"))],
)
def test_a_damaged_step_is_made_again_with_a_word(damage: Callable[[bytes], bytes], runs: Runs) -> None:
    runs.run(LLAMA)
    (path,) = runs.steps
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert not runs.run(LLAMA)
    assert "cannot be used" in runs.words[-1]
    assert path.read_bytes() != damaged
    assert runs.run(LLAMA)


def test_a_removed_step_is_made_again(runs: Runs) -> None:
    runs.run(LLAMA)
    runs.steps[0].unlink()
    assert [runs.run(LLAMA) for _ in range(2)] == [False, True]


def loosened(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o022)


@pytest.mark.parametrize("whose", ["folder", "file", "others"])
def test_nothing_is_loaded_that_others_may_have_written(
    whose: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.run(LLAMA)
    if whose == "others":
        monkeypatch.setattr(os, "getuid", lambda: runs.folder.stat().st_uid + 1)
    else:
        loosened(runs.folder if whose == "folder" else runs.steps[0])
    monkeypatch.setattr(Lowered, "load", lambda *args: pytest.fail("loaded"))
    assert not runs.run(LLAMA)
    assert "another user" in runs.words[-1] if whose == "others" else "others can write to it" in runs.words[-1]


def test_what_is_kept_is_private_whatever_the_mask(runs: Runs) -> None:
    before = os.umask(0)
    try:
        runs.run(LLAMA)
    finally:
        os.umask(before)
    assert runs.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in runs.folder.iterdir()} == {0o600}


def test_two_at_once_make_one_step(runs: Runs) -> None:
    def slow(gm: fx.GraphModule) -> Lowered:
        runs.num_made += 1
        time.sleep(0.5)
        return runs.lowered

    found: list[bool] = []
    both = threading.Barrier(2)

    def run() -> None:
        both.wait()
        found.append(load_or_make(runs.folder, LLAMA, default(), lambda: traced(LLAMA), slow, runs.words.append)[1])

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sorted(found), runs.num_made) == ([False, True], 1)
    assert [word for word in runs.words if "waiting" in word]


@pytest.mark.parametrize("place", ["make", "save", "replace"])
def test_an_interrupt_leaves_nothing_half_done(place: str, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, name = {"make": (runs, "_make"), "save": (Lowered, "save"), "replace": (os, "replace")}[place]
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            runs.run(LLAMA)
    assert not [path.name for path in runs.folder.iterdir() if not path.name.startswith(".lock")]
    assert [runs.run(LLAMA) for _ in range(2)] == [False, True]


def test_a_disk_that_cannot_be_written_spoils_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert not runs.run(LLAMA)
    assert "no space left" in runs.words[-1]
    assert not list(runs.folder.glob(".building*"))


class Stateful:
    """A pass that holds what has no meaning in another process."""

    name = "stateful"

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def apply(self, gm: fx.GraphModule) -> int:
        return 0


def test_what_cannot_be_hashed_is_not_kept_and_that_is_said_once(runs: Runs) -> None:
    say = runs.words.append
    for _ in range(3):
        load_or_make(runs.folder, LLAMA, [Stateful()], lambda: traced(LLAMA), runs._make, say)
    assert (runs.num_made, runs.steps) == (3, [])
    (word,) = runs.words
    assert "not kept" in word
    assert "lock" in word


def test_the_folder_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_files, "MAX_FILES", 4)
    monkeypatch.setattr(step_files, "MAX_BYTES", 100)
    folder = StepFolder(tmp_path / "steps")
    days = {"a": 1, "b": 2, "c": 89, "old": 91, ".building-new": 0, ".building-left": 2, ".lock-1": 200, "large": 3}
    for name, age in days.items():
        folder.write(name, b"x" * (90 if name == "large" else 10))
        os.utime(tmp_path / "steps" / name, (time.time() - age * 86400, time.time() - age * 86400))
    (tmp_path / "steps" / "of an earlier version").mkdir()
    os.utime(tmp_path / "steps" / "of an earlier version", (0, 0))
    folder.prune()
    names = {path.name for path in (tmp_path / "steps").iterdir()}
    assert names == {"a", "b", ".building-new", ".lock-1"}  # no more than 100 bytes, the latest ones
    for name in ("d", "e", "f"):
        folder.write(name, b"x")
    folder.read("b")
    folder.prune()
    assert folder.find("") == [".building-new", ".lock-1", "b", "d", "e", "f"]


def test_what_is_being_built_or_loaded_is_not_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the folder is; what was left a day ago is, and neither takes the place of a step."""
    monkeypatch.setattr(step_files, "MAX_FILES", 1)
    folder = StepFolder(tmp_path / "steps")
    folder.write("step", b"x")
    os.utime(tmp_path / "steps" / "step", (time.time() - 3600, time.time() - 3600))
    replace = os.replace

    def pruned(*paths: Any) -> None:
        folder.prune()
        assert folder.find("step") == ["step"]
        replace(*paths)

    with folder.scratch() as scratch:
        monkeypatch.setattr(os, "replace", pruned)
        folder.write("step", b"y")
        assert scratch.is_dir()
        tomorrow = time.time() + 86400 + 60
        monkeypatch.setattr(time, "time", lambda: tomorrow)
        folder.prune()
        assert not scratch.exists()
    assert folder.find("") == ["step"]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    folder = StepFolder(tmp_path / "steps")
    link = tmp_path / "steps" / "link"
    link.symlink_to(elsewhere)
    os.utime(link, (0, 0), follow_symlinks=False)
    folder.prune()
    assert not link.is_symlink()
    assert (elsewhere / "file").exists()
