"""The mutation tester's edits: what they change, and what they leave alone."""

from __future__ import annotations

import ast

import pytest
from mutations import edits


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if a < b: return", ["if not a < b: return", "if a <= b: return", "pass"]),
        ("x = a and b", ["x = a or b", "x = b", "x = a"]),
        ("key = (a, b)", ["key = (b,)", "key = (a,)"]),
        ("TABLE = {'a', 'b'}", ["TABLE = {'b'}", "TABLE = {'a'}"]),
        ("seen.add(x)", ["pass"]),
        ("x = f(a, key=b)", ["x = f(a)"]),
        ("x = [n for n in a if n]", ["x = [n for n in a]", "x = [n for n in a if not n]"]),
        ("x = n + 1", ["x = n", "x = 1"]),
        ("x = any(a)", ["x = all(a)"]),
        ("x = a[1:]", ["x = a[:]", "x = a[0:]"]),
    ],
)
def test_an_edit_is_one_small_change(before: str, after: list[str]) -> None:
    found = [edit.described() for edit in edits(ast.parse(f"def f(a, b, n):\n    {before}"))]
    assert sorted(new for _, new in found) == sorted(after)


@pytest.mark.parametrize(
    "line",
    ["import os", "x: dict[str, int]", "assert a < b", "raise ValueError(f'{a + 1}')", "'A docstring.'", "a, b = b, a"],
)
def test_left_alone(line: str) -> None:
    assert [edit.described()[1] for edit in edits(ast.parse(line)) if edit.new is not None] == []


def test_an_edit_is_undone_when_it_has_run() -> None:
    tree = ast.parse("def f(n: int) -> int:\n    total = 0\n    total += n\n    return total")
    source = ast.unparse(tree)
    results = []
    for edit in edits(tree):
        namespace: dict = {}
        with edit.applied():
            exec(compile(tree, "mutant", "exec"), namespace)
        results.append(namespace["f"](3))
        assert ast.unparse(tree) == source
    assert sorted(results) == [0, 0, 4], "the sum lost, the result lost, a start of 1"
