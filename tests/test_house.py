"""The house rules as tests: lint, types, import direction, sizes, and files that stand alone."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("autodeploy", "passes")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_MEDIAN_LINES, MAX_FUNCTION_LINES = 400, 150, 60

# The architecture: each room (a folder of `autodeploy`, a file beside them, or `passes`), what it is, and which rooms
# it may import. A room is above all that it imports.
ROOMS = {
    "errors": ("every typed error", ""),
    "options": ("what users set, checked", "errors"),
    "graph": ("FX graphs, and nothing of ours", "errors"),
    "metadata": ("layout of a batch, and the fields derived from it", "errors options graph"),
    "ops": ("what nodes mean: kinds, caches, linear layers", "errors options graph metadata"),
    "kernels": ("how fast: the providers, a file each", "errors options graph metadata ops"),
    "attention_forms": ("attention as models write it themselves", "errors graph metadata ops"),
    "trace": ("a Hugging Face model to a typed graph of canonical nodes", "errors graph metadata ops attention_forms"),
    "passes": ("the rewrites, a file each", "errors options graph metadata ops kernels attention_forms"),
    "viz": ("any two graphs: difference, history, pictures", "errors options graph"),
    "compiler": ("runs passes, and knows none", "errors options graph metadata ops kernels trace viz"),
    "inductor": (
        "a graph to code, kept on disk; torch.compile",
        "errors options graph metadata ops kernels viz compiler",
    ),
    "extend": ("what third parties need, and nothing else", "errors graph metadata ops kernels"),
    "runtime": ("requests to steps to tokens", "errors options metadata ops"),
    "app": ("what a user starts", "errors options graph metadata ops kernels trace viz compiler inductor runtime"),
    "__main__": ("python -m autodeploy", "app"),
    "__init__": ("the public names", "graph metadata kernels trace viz compiler inductor runtime app"),
}
# The one import by name at run time that the table does not show: the compiler loads the package `passes`, where
# another module of that name may stand before it.
ALLOWED_BY_NAME = {("compiler", "passes")}
MAX_LOOSE_FILES = 4


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


MODULES = frozenset(map(_module, SOURCES))


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
    # `from autodeploy.graph import meta` imports a module by its name.
    full = {f"{module}.{alias.name}" for alias in node.names}
    yield from ((name, False) for name in (full & MODULES) or {module})


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_go_down(path: Path) -> None:
    room = _room(_module(path))
    assert room in ROOMS, f"{room} is a new room: say in ROOMS what it is and may import"
    for module, by_name in _imports(ast.parse(path.read_text())):
        target = _room(module)
        if target is None or target == room or (by_name and (room, target) in ALLOWED_BY_NAME):
            continue
        assert target in ROOMS[room][1].split(), f"{_module(path)} imports {module}"


def test_files_import_in_no_circle() -> None:
    """Imports inside functions and those for types alone count, too."""
    modules = {_module(path): path for path in SOURCES}
    graph = nx.DiGraph()
    for name, path in modules.items():
        for module, _ in _imports(ast.parse(path.read_text())):
            graph.add_edge(name, module)
    circles = [sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1]
    assert circles == []


def test_few_files_lie_loose() -> None:
    loose = [path.name for path in SOURCES if path.parent == ROOT / "autodeploy"]
    assert len(loose) <= MAX_LOOSE_FILES, loose


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_one_file_knows_the_keys_of_meta(path: Path) -> None:
    """Others use the keys of `autodeploy.graph.meta`, or copy a node's meta as a whole."""
    if path == ROOT / "autodeploy" / "graph" / "meta.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        is_get = isinstance(node, ast.Attribute) and node.attr in ("get", "pop", "setdefault")
        if (isinstance(node, ast.Subscript) or is_get) and isinstance(node.value, ast.Attribute):
            assert node.value.attr != "meta", f"line {node.lineno}"


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
