"""Compiled steps kept between processes, each found again only by what it was made from.

The key of a step is a hash of the traced graph, the passes and providers with their state, the configuration and the
machine. A model of an installed library is recognised without tracing (`autodeploy.stock`). A step also carries the
hashes of those weights whose values were looked at. Whatever cannot be hashed is not kept.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import fx, nn

from autodeploy.graph.edit import Pass
from autodeploy.inductor.fingerprint import Fingerprint, NotHashable
from autodeploy.inductor.graph_key import add_graph, own_tensors
from autodeploy.inductor.lower import Lowered, hashes
from autodeploy.inductor.machine import machine_key
from autodeploy.inductor.step_files import StepFolder, UnsafeFolder
from autodeploy.inductor.stock import stock_key
from autodeploy.kernels.registry import backends, catalogue, field_launcher, load_linear
from autodeploy.ops import linear
from autodeploy.ops.kinds import kinds

Progress = Callable[[str], None]
_KEY_LENGTH = 64


def load_or_make(
    path: Path,
    model: nn.Module,
    passes: Sequence[Pass],
    trace: Callable[[], fx.GraphModule],
    make: Callable[[fx.GraphModule], Lowered],
    progress: Progress,
) -> tuple[Lowered, bool]:
    """The step kept in the folder `path` and True, or a new one, `make(trace())`, then kept there, and False.

    Two processes that want the same step make it once.
    """
    try:
        folder = StepFolder(path)
        environment = environment_key(_device(model), passes)
    except (UnsafeFolder, OSError) as error:
        progress(f"no compiled step is read from {path} or kept there: {error}")
        return make(trace()), False
    except NotHashable as error:
        _say_not_kept(str(error), progress)
        return make(trace()), False
    return _Search(folder, model, environment, progress).run(trace, make)


def environment_key(device: torch.device, passes: Sequence[Pass]) -> str:
    """Hash of all that a step on `device` depends on beside the model. Raises NotHashable.

    Loads what kept code calls: kinds, backends, linear providers.
    """
    load_linear()
    fingerprint = Fingerprint(machine_key(device), list(passes), kinds(), backends(), catalogue())
    fingerprint.add(field_launcher(device))
    fingerprint.add(linear.providers)
    return fingerprint.hexdigest()


def graph_key(gm: fx.GraphModule, model: nn.Module, environment: str) -> str:
    """The key of the step that comes of `gm`, a trace of `model`. Raises NotHashable."""
    fingerprint = Fingerprint(environment)
    add_graph(fingerprint, gm, model)
    return fingerprint.hexdigest()


class _Search:
    """One model's way to its step."""

    def __init__(self, folder: StepFolder, model: nn.Module, environment: str, progress: Progress) -> None:
        self._folder, self._model, self._environment, self._progress = folder, model, environment, progress

    def run(
        self, trace: Callable[[], fx.GraphModule], make: Callable[[fx.GraphModule], Lowered]
    ) -> tuple[Lowered, bool]:
        stock = stock_key(self._model, self._environment)
        if stock and (lowered := self._load(self._key_of(stock))):
            return lowered, True
        gm = trace()
        try:
            key = graph_key(gm, self._model, self._environment)
        except NotHashable as error:
            _say_not_kept(str(error), self._progress)
            return make(gm), False
        with self._folder.lock(key, lambda: self._progress("another process compiles this step; waiting for it")):
            lowered = self._load(key)
            is_warm = lowered is not None
            if lowered is None:
                lowered = make(gm)
                self._keep(key, lowered)
            if stock:
                self._write(stock, key.encode())
        return lowered, is_warm

    def _key_of(self, stock: str) -> str:
        """The key of the graph that a stock model was traced to before; empty where it was not, or is not known."""
        try:
            data = self._folder.read(stock) or b""
        except (UnsafeFolder, OSError):
            return ""
        return data.decode() if len(data) == _KEY_LENGTH and data.isalnum() else ""

    def _load(self, key: str) -> Lowered | None:
        """The kept step of that key that fits the values of the model's weights, if there is one."""
        names = self._folder.find(f"{key}-") if key else []
        for name in names:
            try:
                data = self._folder.read(name)
                if data is not None and self._fits(data):
                    with self._folder.scratch() as scratch:
                        return Lowered.load(data, scratch)
            except Exception as error:  # a damaged file can fail in any way; it is said, and made again
                reason = f"{type(error).__name__}: {error}"
                self._progress(f"the compiled step {name} cannot be used ({reason}); making it again")
                return None
        if names:
            self._progress("the compiled step was made for other values of weights that decide it; making another")
        return None

    def _fits(self, data: bytes) -> bool:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            wanted = json.loads(archive.read("step.json"))["looked_at"]
        own = own_tensors(self._model)
        return hashes({name: own[name] for name in wanted}) == wanted

    def _keep(self, key: str, lowered: Lowered) -> None:
        try:
            data = lowered.save()
        except Exception as error:  # Inductor's artifacts refuse in many ways, none of which spoils this run
            _say_not_kept(f"Inductor cannot save its code ({type(error).__name__}: {error})", self._progress)
            return
        self._write(f"{key}-{Fingerprint(lowered.looked_at).hexdigest()[:16]}", data)
        self._folder.prune()

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._folder.write(name, data)
        except OSError as error:
            _say_not_kept(str(error), self._progress)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@cache
def _say_not_kept(reason: str, progress: Progress) -> None:
    """Once for each reason."""
    progress(f"the compiled step is not kept, this run goes on: {reason}")
