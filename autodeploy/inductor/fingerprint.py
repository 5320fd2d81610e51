"""Hashes of Python values by what they mean: the same in every process, another wherever code can tell them apart.

Installed code (the standard library, site-packages, our own packages) counts by name, and by the sources of its
package where no version in the key of a step speaks for it. Code that a user wrote counts by what runs: bytecode,
constants, defaults, closures and the globals that it reads, so that a class edited in a notebook is another class.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import operator
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    EllipsisType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Their versions, or the hash of their sources, are in every key.
_VERSIONED = frozenset({"torch", "transformers", "triton", "autodeploy", "passes"})
_OURS = frozenset({"autodeploy", "passes"})
_PLAIN = (NoneType, bool, int, float, complex, bytes, EllipsisType, range)
_TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format)
# What a class body leaves behind beside what its author wrote.
_SKIPPED = re.compile(
    r"_abc_impl|__(dict|weakref|doc|annotations|annotate|annotate_func|annotations_cache|abstractmethods|firstlineno"
    r"|static_attributes|dataclass_fields|dataclass_params)__"
)
_DESCRIPTORS = (MemberDescriptorType, GetSetDescriptorType)


class NotHashable(Exception):
    """A value without a meaning that outlives its process; the message says which, and where it was found."""


class Fingerprint:
    """SHA-256 over values, with their types and in their order. With `installed_only` no user's code is accepted."""

    def __init__(self, *values: Any, installed_only: bool = False) -> None:
        self._hash = hashlib.sha256()
        self._installed_only = installed_only
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is an object's own only as long as that lives
        self._open: list[int] = []
        for value in values:
            self.add(value)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Raises NotHashable."""
        kind = type(value)
        if kind is str:
            self._write("str", value.encode("utf-8", "surrogatepass"))
        elif kind in _PLAIN:
            self._write(kind.__name__, repr(value).encode())
        elif kind is tuple or kind is list or kind is torch.Size:
            self._sequence(value, value)
        elif kind is dict:
            self._sequence(value, value.items())
        elif kind is set or kind is frozenset:
            self._sequence(value, sorted(self._nested(item) for item in value))
        else:
            self._add_object(value)

    def _write(self, tag: str, data: bytes = b"") -> None:
        self._hash.update(f"{tag}:{len(data)}:".encode() + data)

    def _sequence(self, value: Any, items: Any) -> None:
        if id(value) in self._open:
            self._write("cycle", str(self._open.index(id(value))).encode())
            return
        self._write(type(value).__name__, str(len(items)).encode())
        self._open.append(id(value))
        for item in items:
            self.add(item)
        self._open.pop()

    def _nested(self, value: Any) -> str:
        return Fingerprint(value, installed_only=self._installed_only).hexdigest()

    def _add_object(self, value: Any) -> None:
        if id(value) in self._seen:
            self._write("seen", str(self._seen[id(value)]).encode())
            return
        if self._installed_only and isinstance(value, torch.nn.Module):
            raise NotHashable("a module that is held where modules are not registered")
        self._seen[id(value)] = len(self._alive)
        self._alive.append(value)
        self._write(type(value).__name__)
        handler = next((handler for types, handler in _HANDLERS if isinstance(value, types)), Fingerprint._by_pickling)
        handler(self, value)

    def _by_pickling(self, value: Any) -> None:
        """Any other object is what `pickle` would keep of it: its class and its state."""
        try:
            reduced = value.__reduce_ex__(2)
        except Exception as error:  # classes may raise what they like to say that they cannot be kept
            raise NotHashable(f"a value of type {type(value).__module__}.{type(value).__qualname__}") from error
        if isinstance(reduced, str):
            self.add(reduced)
            return
        for part in reduced:
            self.add(list(part) if isinstance(part, Iterator) else part)

    def _tensor(self, value: Tensor) -> None:
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise NotHashable(f"a tensor of type {type(value).__qualname__}")
        self.add((value.dtype, value.device, tuple(value.shape), value.stride(), value.requires_grad))
        self.add(tensor_bytes(value))

    def _by_name(self, value: Any) -> bool:
        """Write the name of installed code, if `value` is that."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not module or not name or not is_installed(module) or find(module, name) is not value:
            return False
        self.add((module, name))
        top = module.partition(".")[0]
        if top not in _VERSIONED and top not in sys.stdlib_module_names:
            self.add(sources_hash(top))
        return True

    def _function(self, value: FunctionType) -> None:
        if self._by_name(value):
            return
        if self._installed_only and not has_installed_code(value):
            raise NotHashable(f"{value.__module__}.{value.__qualname__} is not part of an installed library")
        self.add_code(value.__code__)
        self.add((value.__defaults__, value.__kwdefaults__))
        for cell in value.__closure__ or ():
            self.add(_contents(cell))
        if self._installed_only:
            return
        if late := [name for name in _imports(value.__code__) if not is_installed(name)]:
            raise NotHashable(f"{value.__module__}.{value.__qualname__} imports {late[0]} when it runs")
        names = sorted(_names(value.__code__))
        for name in names:
            if name in value.__globals__:
                self.add(name)
                self._global(value.__globals__[name], names)

    def _global(self, value: Any, names: list[str]) -> None:
        """A global, and where it is a user's module those of its attributes that have one of `names`."""
        if not isinstance(value, ModuleType) or is_installed(value.__name__):
            self.add(value)
        elif id(value) not in self._seen:
            self._add_object(value)
            for name in names:
                if name in vars(value):
                    self.add(name)
                    self._global(vars(value)[name], names)

    def add_code(self, code: CodeType) -> None:
        """What a code object does: its instructions and constants, not the lines that they are on."""
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)
        self._write("code", code.co_code)
        self._write("names", repr(names).encode())
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.add_code(constant)
            else:
                self.add(constant)

    def _class(self, value: type) -> None:
        if self._by_name(value):
            return
        if self._installed_only:
            raise NotHashable(f"{value.__module__}.{value.__qualname__} is not part of an installed library")
        self.add((value.__module__, value.__qualname__, type(value), value.__bases__))
        for name, member in sorted(vars(value).items()):
            if not _SKIPPED.fullmatch(name) and not isinstance(member, _DESCRIPTORS):
                self.add((name, member))

    def _builtin(self, value: BuiltinFunctionType) -> None:
        if not isinstance(value.__self__, (ModuleType, NoneType, type)):
            raise NotHashable(f"a method of a value of type {type(value.__self__).__name__}")
        self.add((value.__module__, value.__qualname__))


_HANDLERS: list[tuple[Any, Callable[[Fingerprint, Any], None]]] = [
    (Tensor, Fingerprint._tensor),
    (FunctionType, Fingerprint._function),
    (type, Fingerprint._class),
    (BuiltinFunctionType, Fingerprint._builtin),
    (ModuleType, lambda self, value: self.add(value.__name__)),
    (MethodType, lambda self, value: self.add((value.__func__, value.__self__))),
    (functools.partial, lambda self, value: self.add((value.func, value.args, value.keywords))),
    (functools._lru_cache_wrapper, lambda self, value: self.add(value.__wrapped__)),
    ((staticmethod, classmethod), lambda self, value: self.add(value.__func__)),
    (property, lambda self, value: self.add((value.fget, value.fset, value.fdel))),
    (functools.cached_property, lambda self, value: self.add(value.func)),
    (_TORCH_PLAIN, lambda self, value: self.add(repr(value))),
    (enum.Enum, lambda self, value: self.add((type(value).__qualname__, value.name))),
    (PurePath, lambda self, value: self.add(str(value))),
    (slice, lambda self, value: self.add((value.start, value.stop, value.step))),
    ((torch._ops.OpOverload, torch._ops.OpOverloadPacket), lambda self, value: self.add(str(value))),
    (torch._ops.HigherOrderOperator, lambda self, value: self.add(value.name())),
]


def tensor_bytes(value: Tensor) -> str:
    """Hash of the values of a tensor, to the bit. Raises NotHashable where they are not plain memory."""
    if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_conj() or value.is_neg():
        raise NotHashable(f"a tensor without plain memory ({value.layout}, {value.device})")
    with _disable_current_modes(), torch.no_grad():
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(flat.numpy().data).hexdigest()


def find(module: str, name: str) -> Any:
    """What is called `name` in a loaded module, None where there is no such thing."""
    try:
        return operator.attrgetter(name)(sys.modules[module])
    except (KeyError, AttributeError):
        return None


@cache
def _roots() -> tuple[str, ...]:
    """Folders of installed code."""
    paths = sysconfig.get_paths()
    return tuple(str(Path(paths[name])) + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def is_installed(module: str) -> bool:
    """Whether a module is code that no user edits: the standard library's, an installed package's, our own."""
    top = module.partition(".")[0]
    if top in _OURS or top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        return top in sys.stdlib_module_names and top != "__main__"
    return top != "__main__" and file.startswith(_roots())


def has_installed_code(function: FunctionType) -> bool:
    """Whether the code of a function was read from an installed file, or made by what was (dataclasses do that)."""
    file = function.__code__.co_filename
    if file.startswith("<"):
        module = function.__globals__.get("__name__", "__main__")
        is_named_tuple = function.__name__ == "__new__" and module.startswith("namedtuple_")
        return file.startswith("<frozen ") or is_named_tuple or is_installed(module)
    return file.startswith(_roots()) or any(file.startswith(_folder(name)) for name in _OURS)


@cache
def _folder(package: str) -> str:
    return str(Path(sys.modules[package].__file__ or "").parent) + "/" if package in sys.modules else "\0"


@cache
def sources_hash(package: str) -> str:
    """Hash of every Python file of a top-level package or module."""
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None:
        return ""
    path = Path(file)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    digest = hashlib.sha256()
    for source in files:
        digest.update(str(source.relative_to(path.parent)).encode() + hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def _names(code: CodeType) -> set[str]:
    """The names that a code object and those inside it look up outside of themselves."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _imports(code: CodeType) -> Iterator[str]:
    """The modules that a code object and those inside it import when they run; relative ones with their dots."""
    instructions = list(dis.get_instructions(code))
    for index, instruction in enumerate(instructions):
        if instruction.opname == "IMPORT_NAME":
            yield "." * instructions[index - 2].argval + instruction.argval  # the level is two instructions before
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imports(constant)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty still
        return NoneType
