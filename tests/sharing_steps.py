"""Steps that are no line of the table: operators, indices, numbers, attributes, modules, effects, regions, branches."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sharing_program import Ref, Step
from sharing_table import NUMBERS
from sharing_world import ATTRIBUTES, BODIES, MODULES, bump, ops, remember
from torch import Tensor

if TYPE_CHECKING:
    from sharing_generate import Generator as G

_OPERATORS: dict[str, tuple[str, ...]] = {
    "binary": (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and_",
        "or_",
        "xor",
        "eq",
        "lt",
        "ge",
        "matmul",
    ),
    "unary": ("neg", "invert", "pos", "abs"),
    "in place": ("iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior", "ixor", "ipow", "imod", "ilshift"),
}
_GETATTR = ("T", "mT", "H", "real", "imag", "data", "shape", "dtype", "device", "ndim", "is_cuda", "layout", "itemsize")
_MEASURES = ("dim", "numel", "size", "stride", "is_contiguous", "storage_offset", "is_floating_point", "element_size")
_INDICES: tuple[Any, ...] = (
    *(0, -1, 1, None, Ellipsis, True, False, slice(None), slice(1, None), slice(None, None, 2), slice(0, 1), ()),
    *(
        (0, 1),
        [0, 1],
        (None, 0),
        (slice(None), 0),
        (Ellipsis, 0),
        (Ellipsis, None),
        ([0], [0]),
        [[0, 1]],
        (slice(1), 1),
    ),
)


def _binary(g: G) -> Step:
    name = g.rng.choice(_OPERATORS["binary"])
    args = (g.tensor(), g.other()) if g.rng.random() < 0.8 else (g.rng.choice(NUMBERS), g.tensor())
    return Step("function", getattr(operator, name), args)


def _unary(g: G) -> Step:
    return Step("function", getattr(operator, g.rng.choice(_OPERATORS["unary"])), (g.tensor(),))


def _in_place(g: G) -> Step:
    return Step("function", getattr(operator, g.rng.choice(_OPERATORS["in place"])), (g.tensor(), g.other()))


_TWO = (operator.add, operator.sub, operator.mul, operator.iadd, operator.imul, operator.floordiv, operator.truediv)
_TWO += (operator.mod, operator.eq, operator.lt, torch.sym_max, torch.sym_min, max, min)
_ONE = (operator.neg, operator.pos, math.floor, math.ceil, math.sqrt, torch.sym_int, torch.sym_float, torch.sym_not)
_ONE += (int, float, bool)


def _number(g: G) -> Ref:
    return g.need(lambda value: type(value) in (int, float, bool))


def _arithmetic(g: G) -> Step:
    function = g.rng.choice(_TWO + _ONE)
    args = (_number(g),) if function in _ONE else (_number(g), g.rng.choice([_number(g), 2, 1, 1.0, 0.5, 3]))
    return Step("function", function, args)


def _subscript(g: G) -> Any:
    index = g.rng.choice(_INDICES)
    chosen = g.rng.random()
    if chosen < 0.25:
        return g.typed(torch.bool, torch.int64, torch.uint8)
    if chosen < 0.35:
        return (index, g.typed(torch.bool, torch.int64)) if not isinstance(index, (tuple, list)) else index
    if chosen < 0.45 and (ref := g.pick(lambda value: type(value) is int)) is not None:
        return g.rng.choice([ref, slice(None, ref), (slice(ref, None),)])
    return index


def _getitem(g: G) -> Step:
    if g.rng.random() < 0.5 and (ref := g.pick(lambda value: isinstance(value, (tuple, list)) and value)) is not None:
        return Step("function", operator.getitem, (ref, g.rng.randrange(len(g.values[ref.place]))))
    return Step("function", operator.getitem, (g.tensor(), _subscript(g)))


def _setitem(g: G) -> Step:
    return Step("function", operator.setitem, (g.tensor(), _subscript(g), g.other()))


def _getattr(g: G) -> Step:
    return Step("function", getattr, (g.tensor(), g.rng.choice(_GETATTR)))


def _measure(g: G) -> Step:
    name = g.rng.choice(_MEASURES)
    args = (g.rng.choice([0, -1]),) if name in ("size", "stride") and g.rng.random() < 0.7 else ()
    if g.rng.random() < 0.3 and name == "size" and args:
        return Step("function", torch.ops.aten.sym_size.int, (g.tensor(), args[0]))
    return Step("method", name, (g.tensor(), *args))


def _host(g: G) -> Step:
    name = g.rng.choice(("item", "item", "tolist", "__len__", "data_ptr", "__bool__", "__int__"))
    if name == "data_ptr":
        return Step("function", torch.equal, (g.tensor(), g.tensor()))
    return Step("method", name, (g.tensor(),))


def _attribute(g: G) -> Step:
    return Step("attribute", g.rng.choice(ATTRIBUTES))


def with_attribute(g: G) -> Step:
    """An input together with an attribute, in a spelling of which there are many."""
    ref = g.add(_attribute(g))
    function = g.rng.choice((torch.add, torch.mul, torch.sub, operator.add, torch.ops.aten.add.Tensor))
    return Step("function", function, (g.tensor(), ref))


def _module(g: G) -> Step:
    return Step("module", g.rng.choice(MODULES), (g.tensor(),))


def _functional(g: G) -> Step:
    rng = g.rng
    function = rng.choice(
        (F.relu, F.hardtanh, F.leaky_relu, F.elu, F.dropout, F.silu, F.selu, F.threshold, F.normalize)
    )
    kwargs: dict[str, Any] = {}
    if function is F.normalize:
        kwargs = {"p": rng.choice([1, 2.0, 2]), "dim": rng.choice([0, -1])}
    elif function is F.threshold:
        kwargs = {"threshold": rng.choice([0, 0.5]), "value": rng.choice([0, 1.0]), "inplace": rng.random() < 0.3}
    elif rng.random() < 0.5:
        kwargs = {"inplace": rng.random() < 0.6}
    if function is F.dropout:
        kwargs |= {"training": rng.random() < 0.5, "p": rng.choice([0.0, 0.5])}
    return Step("function", function, (g.tensor(),), kwargs)


def _norm(g: G) -> Step:
    mean, var = Step("attribute", "norm.running_mean"), Step("attribute", "norm.running_var")
    refs = (g.add(mean), g.add(var))
    flag = g.rng.random() < 0.6
    if g.rng.random() < 0.5:
        return Step("function", F.batch_norm, (g.typed(torch.float32), *refs), {"training": flag})
    return Step(
        "function",
        torch.ops.aten.batch_norm.default,
        (g.typed(torch.float32), None, None, *refs, flag, 0.1, 1e-5, False),
    )


def _embedding(g: G) -> Step:
    weight = g.add(Step("attribute", "table.weight"))
    kwargs = {"max_norm": g.rng.choice([None, 0.5, 1.0])} if g.rng.random() < 0.7 else {}
    return Step("function", F.embedding, (g.typed(torch.int64, torch.int32), weight), kwargs)


def _out(g: G) -> Step:
    function = g.rng.choice((torch.add, torch.mul, torch.sub, torch.maximum))
    return Step("function", function, (g.tensor(), g.tensor()), {"out": g.tensor()})


def _custom(g: G) -> Step:
    kind = g.rng.randrange(5)
    if kind == 0:
        return Step("function", ops.plus.default, (g.tensor(), *[1, 2][: g.rng.randrange(2)]))
    if kind == 1:
        return Step("function", ops.two.default, (g.tensor(),))
    if kind == 2:
        return Step("function", ops.bump.default, (g.tensor(), g.rng.choice([1, 2])))
    if kind == 3:
        return Step("function", ops.log.default, (g.tensor(),))
    return Step("function", ops.fill.default, (g.tensor(),), {"out": g.tensor()})


def _foreign(g: G) -> Step:
    return Step("function", g.rng.choice((remember, bump)), (g.tensor(),))


def _autocast(g: G) -> Step:
    if g.autocasts and g.rng.random() < 0.7:
        return Step("function", torch.amp.autocast_mode._exit_autocast, (g.autocasts.pop(),))
    g.autocasts.append(
        g.add(Step("function", torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None)))
    )
    return Step("function", torch.matmul, (g.typed(torch.float32), g.typed(torch.float32)))


def _cond(g: G) -> Step:
    names = [g.rng.choice(BODIES) for _ in range(2)]
    branches = [g.add(Step("attribute", name)) for name in names]
    predicate = g.need(lambda value: isinstance(value, Tensor) and value.dtype is torch.bool and value.numel() == 1)
    return Step("function", torch.ops.higher_order.cond, (predicate, *branches, (g.tensor(),)))


def _functionalized(g: G) -> Step:
    n, x = g.rng.choice([1, 2]), g.tensor()
    if g.rng.random() < 0.5:
        return Step("function", torch.ops.higher_order.auto_functionalized, (ops.bump.default,), {"x": x, "n": n})
    kwargs = {"n": n, "_x_base_index": 0, "_all_bases": [x]}
    return Step("function", torch.ops.higher_order.auto_functionalized_v2, (ops.bump.default,), kwargs)


def _map(g: G) -> Step:
    body = g.add(Step("attribute", g.rng.choice(BODIES)))
    return Step("function", torch.ops.higher_order.map_impl, (body, [g.tensor()], []))


def _wrapped(g: G) -> Step:
    body = g.add(Step("attribute", g.rng.choice(BODIES)))
    if g.rng.random() < 0.5:
        args = (g.rng.random() < 0.5, body, g.tensor())
        return Step("function", torch.ops.higher_order.wrap_with_set_grad_enabled, args)
    args = ("cpu", torch.bfloat16, g.rng.random() < 0.5, None, body, g.tensor())
    return Step("function", torch.ops.higher_order.wrap_with_autocast, args)


def _loop(g: G) -> Step:
    condition, body = (g.add(Step("attribute", name)) for name in ("is_small", "plus_one"))
    return Step("function", torch.ops.higher_order.while_loop, (condition, body, (g.typed(torch.int64),), ()))


def _seed(g: G) -> Step:
    return Step("function", torch.manual_seed, (g.rng.choice([0, 1]),))


def _pool(g: G) -> Step:
    function = g.rng.choice((F.fractional_max_pool2d, F.max_pool1d, F.gumbel_softmax, F.avg_pool1d))
    if function is F.fractional_max_pool2d:
        x = g.add(Step("method", "expand", (g.typed(torch.float32), 1, 4, 4)))
        return Step("function", function, (x, 2), {"output_size": (2, 2)})
    if function is F.gumbel_softmax:
        return Step("function", function, (g.typed(torch.float32),), {"hard": g.rng.random() < 0.5})
    return Step("function", function, (g.typed(torch.float32), 2))


STEPS: tuple[Callable[[Any], Step], ...] = (
    *(_binary, _binary, _unary, _in_place, _in_place, _arithmetic, _arithmetic, _getitem, _getitem, _getitem, _setitem),
    *(
        _setitem,
        _getattr,
        _getattr,
        _measure,
        _measure,
        _measure,
        _host,
        _attribute,
        _attribute,
        _attribute,
        _attribute,
    ),
    *(_module, _module, _module, _functional, _functional, _norm, _embedding, _out, _out, _custom, _custom, _foreign),
    *(_autocast, _cond, _functionalized, _map, _wrapped, _loop, _seed, _pool),
)
