"""A hash of all that tracing reads, for models of an installed library: it saves seconds of tracing on a warm start.

Only where all of that can be known: every class of the model's modules is an installed one, nobody has replaced any of
their code, no module has hooks or holds code of a user, and what modules hold beside tensors can be hashed. What is
found in any other way is not stock, and such a model is traced to know it.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, ModuleType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from autodeploy.inductor.fingerprint import Fingerprint, NotHashable, find, has_installed_code, is_installed
from autodeploy.inductor.graph_key import add_forms, own_tensors

_LIBRARY = "transformers"
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
_GLOBAL_HOOKS = tuple(name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and "hook" in name)
# Drawn in each process, to tell it to the hub; and two lists to which classes add themselves when they are first used.
_OF_THE_PROCESS = ("SESSION_ID", "_CAN_RECORD_REGISTRY", "_registered_model_output_types")
_REGISTERED = ("_parameters", "_buffers", "_modules")


def stock_key(model: nn.Module, environment: str) -> str | None:
    """Equal for two models only if tracing them gives the same graph; None where the model is not stock."""
    try:
        fingerprint = Fingerprint(environment, installed_only=True)
        _check_hooks(model)
        _check_torch()
        fingerprint.add((_torch_names(), _installed_packages()))
        for path, module in model.named_modules(remove_duplicate=False):
            fingerprint.add(path)
            _add_module(fingerprint, module)
        add_forms(fingerprint, own_tensors(model))
        _Library(fingerprint).add(base for module in model.modules() for base in type(module).__mro__)
    except (NotHashable, RecursionError):
        return None
    return fingerprint.hexdigest()


def _check_hooks(model: nn.Module) -> None:
    if any(getattr(torch.nn.modules.module, name) for name in _GLOBAL_HOOKS):
        raise NotHashable("a hook of all modules")
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if "hook" in name and value:
                raise NotHashable(f"{path} has {name}")


def _add_module(fingerprint: Fingerprint, module: nn.Module) -> None:
    """The class of a module, and what it holds beside its own parameters, buffers and modules."""
    fingerprint.add(type(module))
    for name, value in vars(module).items():
        if name in _REGISTERED:
            fingerprint.add((name, [(key, item is None) for key, item in value.items()]))
        elif isinstance(value, nn.Module):
            raise NotHashable(f"{name} is a module that is not registered")
        elif isinstance(value, GenerationConfig):  # no code of a forward pass reads it; it holds a hash of Python's
            fingerprint.add(name)
        else:
            fingerprint.add((name, value))
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        fingerprint.add(vars(tensor))


def _installed_packages() -> list[str]:
    """Names and versions: libraries ask what else is installed."""
    folders = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    return sorted(path.name for folder in folders for path in Path(folder).glob("*-info"))


def _torch_names() -> list[tuple[str, str]]:
    """What torch's own functions are called by: one may have been put in the place of another."""
    owners = (torch, torch.Tensor, torch.nn.functional)
    items = [item for owner in owners for item in sorted(vars(owner).items())]
    return [(name, value.__qualname__) for name, value in items if type(value) in _FUNCTIONS]


def _check_torch() -> None:
    """Nobody has put code of his own into the parts of torch that run while a model is traced."""
    for name, module in list(sys.modules.items()):
        if (name == "torch" or name.startswith("torch.")) and not name.startswith("torch._inductor"):
            for value in list(vars(module).values()):
                for function in _functions(value):
                    _check_code(function, name)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions that a global of a module is: itself, or those of a class."""
    if type(value) is FunctionType:
        yield value
    elif issubclass(type(value), type):
        for member in vars(value).values():
            member = getattr(member, "__func__", member)
            if type(member) is FunctionType:
                yield member


def _check_code(function: FunctionType, where: str) -> None:
    if not has_installed_code(function):
        raise NotHashable(f"{where} has {function.__qualname__} of {function.__module__}")


class _Library:
    """Adds the modules of the library that code of given classes can reach, as they are in this process.

    What is neither code, a container nor plain counts by its type and what it holds; locks, loggers and other things
    of the standard library by their type.
    """

    def __init__(self, fingerprint: Fingerprint) -> None:
        self._fingerprint = fingerprint
        self._seen: set[int] = set()
        self._waiting: list[str] = []
        self._known: set[str] = set()

    def add(self, classes: Iterator[type]) -> None:
        for cls in dict.fromkeys(classes):
            self._fingerprint.add((cls.__module__, cls.__qualname__))
            self._class_body(cls)
        while self._waiting:
            name = self._waiting.pop(0)
            self._fingerprint.add(name)
            for attribute, value in sorted(vars(sys.modules[name]).items()):
                if not attribute.startswith("__") and attribute not in _OF_THE_PROCESS:
                    self._fingerprint.add(attribute)
                    self._value(value)

    def _reach(self, module: str | None) -> None:
        # What is in a lazy module depends on who asked for what; it defines nothing itself.
        is_plain = type(sys.modules.get(module or "")) is ModuleType
        if module and is_plain and module not in self._known and module.partition(".")[0] == _LIBRARY:
            self._known.add(module)
            self._waiting.append(module)

    def _value(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self._fingerprint.add(value)
        elif issubclass(kind, ModuleType):
            self._fingerprint.add(value.__name__)
            self._reach(value.__name__)
        elif kind is FunctionType:
            self._function(value)
        elif kind is functools._lru_cache_wrapper:
            self._value(value.__wrapped__)
        elif issubclass(kind, type):
            self._class(value)
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            self._holder(value)

    def _holder(self, value: Any) -> None:
        """A container, or an object."""
        kind = type(value)
        self._fingerprint.add(kind.__qualname__)
        if isinstance(value, dict):
            for key, item in dict.items(value):
                self._value(key)
                self._value(item)
        elif kind in (list, tuple):
            for item in value:
                self._value(item)
        elif kind in (set, frozenset):
            self._fingerprint.add(sorted(map(repr, value)))
        elif isinstance(value, Tensor):
            self._fingerprint.add(value)
        elif kind.__module__.partition(".")[0] == _LIBRARY and hasattr(value, "__dict__"):
            for name, item in sorted(vars(value).items()):
                self._fingerprint.add(name)
                self._value(item)

    def _function(self, function: FunctionType) -> None:
        _check_code(function, "the library")
        self._fingerprint.add((function.__module__, function.__qualname__))
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        self._reach(function.__module__)
        self._fingerprint.add_code(function.__code__)
        for cell in function.__closure__ or ():
            try:
                self._value(cell.cell_contents)
            except ValueError:  # empty still
                self._fingerprint.add("empty")
        self._value(function.__defaults__)
        self._value(function.__kwdefaults__)

    def _class(self, cls: type) -> None:
        if not is_installed(cls.__module__):
            raise NotHashable(f"{cls.__module__}.{cls.__qualname__} in the library")
        self._fingerprint.add((cls.__module__, cls.__qualname__))
        if cls.__module__.partition(".")[0] == _LIBRARY:
            self._reach(cls.__module__)
            self._class_body(cls)

    def _class_body(self, cls: type) -> None:
        if id(cls) in self._seen:
            return
        self._seen.add(id(cls))
        if find(cls.__module__, cls.__qualname__) is not cls and "<locals>" not in cls.__qualname__:
            self._fingerprint.add("not found under its name")
        for name, member in sorted(vars(cls).items()):
            if name in ("__dict__", "__weakref__", "__doc__") or name.startswith("_abc_"):
                continue
            self._fingerprint.add(name)
            for part in (member.fget, member.fset) if isinstance(member, property) else (member,):
                self._value(getattr(part, "__func__", part))
