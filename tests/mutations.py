"""Small wrong edits of a module, which a test suite must notice.

Left alone: imports, annotations, decorators, assertions, strings, and what is only said in an error.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
}
_SWAPPED_NAMES = {"any": "all", "all": "any", "min": "max", "max": "min"}
# From which positional argument on a call can do without.
_OPTIONAL_FROM = {"getattr": 2, "get": 1, "pop": 1, "range": 1, "max": 1, "min": 1, "sum": 1, "next": 1, "union": 1}
# What a function with such an annotation returns instead.
_EMPTY = {
    "int": "0",
    "str": "''",
    "list": "[]",
    "tuple": "()",
    "set": "set()",
    "frozenset": "frozenset()",
    "dict": "{}",
}
_OPPOSED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
_JUMPS = (ast.Return, ast.Continue, ast.Break, ast.Raise)
_UNTOUCHED = (ast.Import, ast.ImportFrom, ast.Assert, ast.Raise, ast.JoinedStr, ast.expr_context)
_UNTOUCHED_FIELDS = {"annotation", "returns", "decorator_list", "bases"}


@dataclass(frozen=True)
class Scope:
    """Where an edit stands: function (a table by its name), what that returns, statement, what encloses the place."""

    function: str = ""
    returns: str = ""
    statement: ast.stmt | None = None
    parent: ast.AST | None = None

    def enter(self, node: ast.AST) -> Scope:
        """The scope of what `node` consists of."""
        scope = replace(self, parent=node)
        if isinstance(node, ast.stmt):
            scope = replace(scope, statement=node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = replace(scope, function=f"{self.function}.{node.name}".lstrip("."))
        if isinstance(node, ast.FunctionDef):
            scope = replace(scope, returns=ast.unparse(node.returns) if node.returns else "")
        if not self.function and isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            scope = replace(
                scope, function=ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            )
        return scope


@dataclass(frozen=True)
class Edit:
    """`new` in the place `index` of the field `field` of `owner`; None takes a statement away."""

    owner: ast.AST
    field: str
    index: int | None
    new: ast.AST | None
    statement: ast.stmt
    function: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The tree with this edit in it."""
        old = getattr(self.owner, self.field)
        new = self.new
        if self.index is not None:
            new = [*old[: self.index], self.new or ast.Pass(), *old[self.index + 1 :]]
        setattr(self.owner, self.field, new)
        ast.fix_missing_locations(self.owner)
        try:
            yield
        finally:
            setattr(self.owner, self.field, old)

    def described(self) -> tuple[str, str]:
        """The statement before and after; of a compound one the beginning."""
        before = _beginning(self.statement)
        if self.new is None or isinstance(self.new, ast.stmt):
            return before, _beginning(self.new or ast.Pass())
        with self.applied():
            return before, _beginning(self.statement)


def edits(tree: ast.AST) -> list[Edit]:
    """All edits of `tree` in the order of its source, each once."""
    found: dict[tuple[int, str, str], Edit] = {}
    for edit in _edits(tree, Scope()):
        before, after = edit.described()
        if before != after:
            found.setdefault((edit.statement.lineno, before, after), edit)
    return list(found.values())


def _beginning(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return next(line for line in lines if line.startswith(("def", "class")))
    if isinstance(node, ast.If) and len(lines) == 2:
        return f"{lines[0]} {lines[1].strip().split('(')[0]}"
    return lines[0]


def _edits(node: ast.AST, scope: Scope) -> Iterator[Edit]:
    inner = scope.enter(node)
    for field, index, child in _children(node):
        statement = child if isinstance(child, ast.stmt) else inner.statement
        if isinstance(child, _UNTOUCHED) and not isinstance(child, ast.Raise):
            continue
        for new in _replacements(child, field, inner):
            assert statement is not None
            function = inner.enter(child).function if isinstance(child, ast.stmt) else inner.function
            yield Edit(node, field, index, new, statement, function)
        if not isinstance(child, _UNTOUCHED):
            yield from _edits(child, inner)


def _children(node: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    for field, value in ast.iter_fields(node):
        if field in _UNTOUCHED_FIELDS:
            continue
        if isinstance(value, ast.AST):
            yield field, None, value
        elif isinstance(value, list):
            yield from ((field, index, item) for index, item in enumerate(value) if isinstance(item, ast.AST))


def _replacements(node: ast.AST, field: str, scope: Scope) -> Iterator[ast.AST | None]:
    """What may stand in the place of `node`, which is in the field `field` of `scope.parent`."""
    if isinstance(node, ast.stmt):
        if _is_removable(node, scope.parent):
            yield None
        if isinstance(node, ast.Return) and node.value is not None:
            yield from (_with(node, value=value) for value in _other_results(node.value, scope.returns))
    if field in ("test", "ifs") and isinstance(node, ast.expr):
        yield from _negated(node)
    if isinstance(node, ast.comprehension):
        yield from (_with(node, ifs=_without(node.ifs, index)) for index in range(len(node.ifs)))
    elif isinstance(node, ast.Slice):
        given = [name for name in ("lower", "upper", "step") if getattr(node, name) is not None]
        yield from (_with(node, **{name: None}) for name in given)
    elif isinstance(node, ast.expr):
        yield from _other_values(node, scope.parent)


def _is_removable(node: ast.stmt, parent: ast.AST | None) -> bool:
    """Whether the module runs without `node`; one that is all of an `if` goes with that."""
    if isinstance(parent, ast.If) and not parent.orelse and len(parent.body) == 1:
        return False
    if isinstance(node, ast.If):
        return not node.orelse and (len(node.body) == 1 or isinstance(node.body[-1], _JUMPS))
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return is_call or isinstance(node, ast.AugAssign | ast.Delete | ast.Continue | ast.Break | ast.Raise)


def _other_results(value: ast.expr, returns: str) -> Iterator[ast.expr]:
    if returns == "bool":
        yield from _negated(value)
        return
    head = (re.match(r"\w+", returns) or [""])[0]
    empty = "None" if "None" in returns else _EMPTY.get(head, "None")
    yield ast.parse(empty, mode="eval").body


def _negated(node: ast.expr) -> Iterator[ast.expr]:
    """Not where another edit of `node` says the same."""
    is_opposed = isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], _OPPOSED)
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    if not is_opposed and not is_not and not isinstance(node, ast.Constant):
        yield ast.UnaryOp(ast.Not(), node)


def _other_values(node: ast.expr, parent: ast.AST | None) -> Iterator[ast.expr]:
    if isinstance(node, ast.Constant):
        yield from _other_constants(node, parent)
    elif isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:index], _SWAPPED[type(op)](), *node.ops[index + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=_SWAPPED[type(node.op)]())
        for index in range(len(node.values)):
            rest = _without(node.values, index)
            yield _with(node, values=rest) if len(rest) > 1 else rest[0]
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand
    elif isinstance(node, ast.BinOp):
        yield from _other_operations(node)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        yield from _shorter(node, parent)
    elif isinstance(node, ast.Dict):
        for index in range(len(node.keys)):
            yield _with(node, keys=_without(node.keys, index), values=_without(node.values, index))


def _other_constants(node: ast.Constant, parent: ast.AST | None) -> Iterator[ast.expr]:
    """None for `strict`, the sign of -1, and the 1 of x + 1, which goes with its sum."""
    is_strict = isinstance(parent, ast.keyword) and parent.arg == "strict"
    if is_strict or isinstance(parent, ast.UnaryOp) or (isinstance(parent, ast.BinOp) and node.value == 1):
        return
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int | float):
        yield ast.Constant(1 - node.value if node.value in (0, 1) else node.value + 1)


def _other_operations(node: ast.BinOp) -> Iterator[ast.expr]:
    if any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right)):
        return
    if type(node.op) in _SWAPPED:
        yield _with(node, op=_SWAPPED[type(node.op)]())
    yield node.left
    if not isinstance(node.op, ast.Sub | ast.FloorDiv | ast.Mod):
        yield node.right


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _other_calls(node: ast.Call) -> Iterator[ast.expr]:
    name = ast.unparse(node.func).split(".")[-1]
    if isinstance(node.func, ast.Name) and name in _SWAPPED_NAMES:
        yield _with(node, func=ast.Name(_SWAPPED_NAMES[name], ast.Load()))
    for index, arg in enumerate(node.args):
        if isinstance(arg, ast.Starred) or index >= _OPTIONAL_FROM.get(name, len(node.args)):
            yield _with(node, args=_without(node.args, index))
    for index, keyword in enumerate(node.keywords):
        if keyword.arg not in ("strict", "fix", "where"):
            yield _with(node, keywords=_without(node.keywords, index))


def _shorter(node: ast.Tuple | ast.List | ast.Set, parent: ast.AST | None) -> Iterator[ast.expr]:
    """Not where the number of items is fixed: targets, what is assigned to several of them, and types."""
    is_unpacked = isinstance(parent, ast.Assign) and any(isinstance(to, ast.Tuple) for to in parent.targets)
    is_stored = not isinstance(node, ast.Set) and not isinstance(node.ctx, ast.Load)
    is_type = isinstance(parent, ast.Subscript) and ast.unparse(parent.value) in ("dict", "tuple", "Callable")
    if not is_unpacked and not is_stored and not is_type:
        rest = [_without(node.elts, index) for index in range(len(node.elts))]
        yield from (_with(node, elts=elts) if elts or not isinstance(node, ast.Set) else _call("set") for elts in rest)


def _call(name: str) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), [], [])


def _without(items: list, index: int) -> list:
    return [*items[:index], *items[index + 1 :]]


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new
