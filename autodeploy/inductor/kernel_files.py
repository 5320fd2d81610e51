"""The C++ kernels of compiled code, kept beside it: loading needs no compiler and none of Inductor's own folders.

Inductor's artifact holds the source of its kernels, and looks for the libraries in a folder that is temporary by
default. There it also tries out the instruction sets of the machine: 13 s on two cores once that folder is gone, 1.6 s
in each process while it is there. So the wrapper code in an artifact of ours asks the `AsyncCompile` of this file,
which has the library of each kernel by the hash of its source.
"""

from __future__ import annotations

import ast
import hashlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch._inductor import async_compile
from torch._inductor.codecache import CppPythonBindingsCodeCache, PyCodeCache, code_hash
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.standalone_compile import AOTCompiledArtifact

_IMPORT = "from torch._inductor.async_compile import AsyncCompile"
_OWN_IMPORT = f"from {__name__} import AsyncCompile"
_libraries: ContextVar[Mapping[str, Path] | None] = ContextVar("libraries", default=None)


class AsyncCompile(async_compile.AsyncCompile):
    """Inductor's, except that while an artifact of ours is loaded its C++ kernels come from its own libraries."""

    def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
        libraries = _libraries.get()
        if libraries is None:
            return super().cpp_pybinding(argtypes, source_code)
        path = libraries[_name(argtypes, source_code)]
        return CppPythonBindingsCodeCache._load_library(str(path), path.stem).kernel


def pack(artifact: AOTCompiledArtifact) -> tuple[bytes, dict[str, bytes]]:
    """The artifact, as `unpack` takes it, and the libraries of its C++ kernels by name."""
    bundle = pickle.loads(artifact.serialize())
    code: CompiledFxGraph = bundle[0].compiled_fw.result
    module = PyCodeCache.load_by_key_path(code.cache_key, code.write_to_disk())
    libraries = {name: Path(getattr(module, kernel).__self__.__file__) for kernel, name in _kernels(code.source_code)}
    if _IMPORT not in code.source_code:
        raise RuntimeError("Inductor writes its code in another way than this version knows")
    code.source_code = code.source_code.replace(_IMPORT, _OWN_IMPORT)
    code.cache_key = code_hash(code.source_code)
    return pickle.dumps(bundle), {name: path.read_bytes() for name, path in libraries.items()}


def unpack(data: bytes, folder: Path) -> AOTCompiledArtifact:
    """The artifact that `pack` gave, its libraries from `folder`, which may be removed afterwards.

    Runs code that is in `data` and `folder`. Raises KeyError where a library is missing.
    """
    with _libraries_from(folder):
        return AOTCompiledArtifact.deserialize(data)


@contextmanager
def _libraries_from(folder: Path) -> Iterator[None]:
    token = _libraries.set({path.stem: path for path in folder.glob("*.so")})
    try:
        yield
    finally:
        _libraries.reset(token)


def _kernels(source: str) -> Iterator[tuple[str, str]]:
    """(name in the wrapper code, name of the library) of each C++ kernel."""
    for statement in ast.parse(source).body:
        call = statement.value if isinstance(statement, ast.Assign) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "async_compile.cpp_pybinding":
            assert isinstance(statement, ast.Assign)
            yield ast.unparse(statement.targets[0]), _name(*map(ast.literal_eval, call.args))


def _name(argtypes: list[str], source_code: str) -> str:
    return "k" + hashlib.sha256(repr((argtypes, source_code)).encode()).hexdigest()[:40]
