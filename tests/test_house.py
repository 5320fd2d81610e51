"""The house rules as tests: lint, types, import direction, sizes, and files that stand alone."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("autodeploy", "passes")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_MEDIAN_LINES, MAX_FUNCTION_LINES = 400, 150, 60

# Who may import whom: a room is a module or subpackage of autodeploy, or the package `passes`.
_BASE = {"errors", "options", "arguments"}
_NODES = {"spelling", "effects", "aliasing", "values"}
_SHARING = {"graph", "sizes", "dependence", "equality", "memory", "outline"}
_GRAPH = _NODES | _SHARING | {"along", "mixing", "spec", "pipeline"}
_CORE = _BASE | _GRAPH | {"ops", "metadata"}
ALLOWED = {
    "errors": set(),
    "options": {"errors"},
    "arguments": {"errors"},
    "demo": _BASE,
    "models": _BASE | {"demo"},
    "ops": _BASE,
    "spelling": set(),
    "effects": {"spelling"},
    "aliasing": {"spelling", "effects", "graph"},
    "values": {"errors", "spelling", "sizes"},
    "sizes": set(),
    "graph": _BASE | {"values"},
    "own_passes": _BASE,
    "dependence": _BASE | _NODES | {"graph"},
    "equality": _NODES | {"graph"},
    "memory": _NODES | {"equality", "graph", "sizes"},
    "outline": {"graph", "dependence", "spelling", "values"},
    "along": set(),
    "mixing": _BASE | {"along", "graph", "dependence"},
    "spec": _BASE | {"graph", "dependence", "values"},
    "metadata": _BASE | _NODES | {"graph", "dependence"},
    "pipeline": _BASE | _GRAPH | {"metadata"},
    "kernels": _BASE | {"ops", "metadata"},
    "attention_forms": _CORE,
    "trace": _CORE | {"attention_forms"},
    "report": _CORE,
    "verify": _CORE,
    "runtime": _BASE | {"ops", "metadata"},
    "passes": _CORE | {"attention_forms"},
    "kept": _NODES | {"graph"},
    "fingerprint": set(),
    "graph_key": {"fingerprint", "graph"},
    "stock": {"fingerprint", "graph_key"},
    "machine": {"fingerprint", "options"},
    "kernel_files": set(),
    "step_files": set(),
    "lowering": _CORE | {"fingerprint", "graph_key", "kept", "kernel_files", "machine", "report"},
    "step_cache": _CORE | {"fingerprint", "graph_key", "lowering", "machine", "step_files", "stock"},
    "viz": _BASE | {"graph", "sizes"},
    "backend": _CORE | {"own_passes", "report", "trace", "verify", "viz"},
    "dynamo": _CORE | {"own_passes", "report"},
    "llm": _CORE | {"backend", "lowering", "models", "report", "runtime", "step_cache", "trace"},
    "doctor": _BASE | {"ops", "metadata", "own_passes"},
    "cli": _BASE | {"backend", "doctor", "llm", "models", "runtime", "trace", "viz"},
    "__main__": {"cli"},
    "__init__": _CORE | {"backend", "dynamo", "llm", "runtime", "trace", "viz"},
}
# Imports by name at run time. The registry is the one place below the kernels that loads them, when first asked;
# `own_passes` is the one place where `autodeploy` loads the passes, which import it.
ALLOWED_BY_NAME = {("ops", "kernels"), ("own_passes", "passes")}


def _run(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_finds_nothing() -> None:
    _run("ruff", "check", ".")


def test_formatting() -> None:
    _run("ruff", "format", "--check", ".")


def test_pyright_finds_nothing() -> None:
    _run("pyright")


def _room(module: str) -> str | None:
    """The room that a dotted module name lies in, None for foreign modules."""
    parts = module.split(".")
    if parts[0] == "passes":
        return "passes"
    if parts[0] != "autodeploy":
        return None
    return parts[1] if len(parts) > 1 else "__init__"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether by name at run time) of every import of `tree`, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _from_imports(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).removeprefix("f").strip("'\""), True


def _from_imports(node: ast.ImportFrom) -> Iterator[tuple[str, bool]]:
    assert node.level == 0, f"relative import at line {node.lineno}"
    module = node.module or ""
    # `from autodeploy import options` reaches a room by its name.
    names = [f"autodeploy.{alias.name}" for alias in node.names] if module == "autodeploy" else [module]
    yield from ((name, False) for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_go_down(path: Path) -> None:
    room = _room(_module(path))
    assert room in ALLOWED, f"{room} is a new room: say in ALLOWED what it may import"
    for module, by_name in _imports(ast.parse(path.read_text())):
        target = _room(module)
        if target is None or target == room or (by_name and (room, target) in ALLOWED_BY_NAME):
            continue
        assert target in ALLOWED[room], f"{_module(path)} imports {module}"


def test_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES}
    with capsys.disabled():
        print(f"\n{len(lines)} source files, {sum(lines.values())} lines", end=" ")
    assert not [(_module(path), n) for path, n in lines.items() if n > MAX_FILE_LINES]
    assert statistics.median(lines.values()) < MAX_MEDIAN_LINES


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_functions_are_short(path: Path) -> None:
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    for node in functions:
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        assert length < MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_files_stand_alone() -> None:
    """No tracked text file names a folder of the machine that it was written on."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    machine_path = re.compile(r"(?<![\w.~/])/(home|root|Users|work)/\w")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    found = [path.name for path in paths if path.is_file() and machine_path.search(path.read_text(errors="ignore"))]
    assert not found
