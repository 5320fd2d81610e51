"""Productions of random graphs that write, draw random numbers, have effects or sizes that depend on values."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from fx_fuzz_root import COLUMNS, MODULES, ops, remember
from torch import fx

if TYPE_CHECKING:
    from fx_fuzz import Production, Scope

aten = torch.ops.aten


def _row(s: Scope) -> fx.Node:
    return s.call(aten.select.int, s.x, 0, s.n % 3)


def _float(s: Scope) -> fx.Node:
    return s.call(aten._to_copy.default, s.x, dtype=torch.float32)


def _fresh(s: Scope) -> fx.Node:
    """A value of this step's own, to be reshaped in place."""
    return s.call(aten.neg.default, s.x)


def _pair(s: Scope) -> fx.Node:
    return s.call(torch.stack, [s.attribute("twin"), s.attribute("zero")])


def _out(s: Scope) -> fx.Node:
    """y where it has the shape of x; torch would resize it otherwise."""
    if s.example(s.x).shape != s.example(s.y).shape:
        raise ValueError("of another shape")
    return s.y


WRITES: dict[str, Production] = {
    "add_": lambda s: s.call(aten.add_.Tensor, s.x, 1 + s.n % 3),
    "mul_ by a value": lambda s: s.call(aten.mul_.Tensor, s.x, s.y),
    "add_ to a row": lambda s: s.call(aten.add_.Tensor, _row(s), 1),
    "add_ to a view": lambda s: s.call(aten.add_.Tensor, s.call(aten.view.default, s.x, [-1]), 1),
    "add_ to a transposed": lambda s: s.call(aten.add_.Tensor, s.call(torch.transpose, s.x, 0, -1), 1),
    "add_ to a detached": lambda s: s.call(aten.add_.Tensor, s.call(aten.detach.default, s.x), 1),
    "add_ to as_strided": lambda s: s.call(aten.add_.Tensor, s.call(aten.as_strided.default, s.x, [2], [1]), 1),
    "add_ to what may be itself": lambda s: s.call(
        aten.add_.Tensor, s.call(aten.to.dtype, s.x, (torch.float32, torch.int64)[s.n % 2]), 1
    ),
    "add_ to T": lambda s: s.call(aten.add_.Tensor, s.call(getattr, s.x, ("T", "data")[s.n % 2]), 1),
    "add_ to an item": lambda s: s.call(
        aten.add_.Tensor, s.call(operator.getitem, s.call(aten.unbind.int, s.x), s.n % 3), 1
    ),
    "add_ to the second of two": lambda s: s.call(
        aten.add_.Tensor, s.call(operator.getitem, s.call(torch.broadcast_tensors, s.x, s.y), 1), 1
    ),
    "add_ to x[1:]": lambda s: s.method("add_", s.call(operator.getitem, s.x, slice(1, None)), 1),
    "add_ to an identity": lambda s: s.method("add_", s.module("identity", s.x), 1),
    "copy_": lambda s: s.call(aten.copy_.default, s.x, s.y),
    "copy_ to a row": lambda s: s.call(aten.copy_.default, _row(s), s.call(aten.select.int, s.y, 0, 0)),
    "index_put_": lambda s: s.call(
        aten.index_put_.default, s.x, [s.call(aten.arange.default, 2)], s.attribute("scalar")
    ),
    "scatter_": lambda s: s.call(
        aten.scatter_.value, s.x, 0, s.call(aten.zeros_like.default, s.y, dtype=torch.int64), s.n
    ),
    "masked_fill_": lambda s: s.call(aten.masked_fill_.Scalar, s.x, s.call(aten.gt.Scalar, s.y, 0), s.n),
    "fill_": lambda s: s.call(aten.fill_.Scalar, s.x, s.n),
    "zero_ a buffer": lambda s: s.call(aten.zero_.default, s.attribute("buffer")),
    "add_ to a view of a buffer": lambda s: s.call(aten.add_.Tensor, s.attribute("view"), 1),
    "add_ to a transposed buffer": lambda s: s.call(aten.add_.Tensor, s.attribute("twisted_view"), 1),
    "unsqueeze_": lambda s: s.call(aten.unsqueeze_.default, _fresh(s), 0),
    "method t_": lambda s: s.method("t_", _fresh(s)),
    "method add_": lambda s: s.method("add_", s.x, s.y),
    "method clamp_": lambda s: s.method("clamp_", s.x, min=0),
    "method __iadd__": lambda s: s.method("__iadd__", s.x, 1),
    "iadd": lambda s: s.call(operator.iadd, s.x, s.y),
    "imul": lambda s: s.call(operator.imul, s.x, 2),
    "setitem": lambda s: s.call(operator.setitem, s.x, (s.n % 3, slice(None)), 2),
    "setitem mask": lambda s: s.call(operator.setitem, s.x, s.call(operator.gt, s.y, 0), -1),
    "__setitem__": lambda s: s.method("__setitem__", s.x, slice(None, 2), 3),
    "F.relu in place": lambda s: s.call(F.relu, s.x, inplace=True),
    "F.relu in place by position": lambda s: s.call(F.relu, s.x, True),
    "torch.relu_": lambda s: s.call(torch.relu_, s.x),
    "Tensor.add_": lambda s: s.call(torch.Tensor.add_, s.x, 1),
    "torch.add out": lambda s: s.call(torch.add, s.x, 1, out=_out(s)),
    "aten.add.out": lambda s: s.call(aten.add.out, s.x, 1, out=_out(s)),
    "aten.cumsum.out": lambda s: s.call(aten.cumsum.out, s.x, 0, out=_out(s)),
    "torch.max out": lambda s: s.call(torch.max, _pair(s), 0, out=(s.attribute("buffer"), s.attribute("counter"))),
    "embedding with max_norm": lambda s: s.call(
        F.embedding, s.call(aten._to_copy.default, s.call(aten.gt.Scalar, s.y, 0), dtype=torch.int64), s.x, None, 1.0
    ),
    "batch_norm in training": lambda s: s.call(
        F.batch_norm, _float(s), s.attribute("norm.running_mean"), s.attribute("norm.running_var"), training=True
    ),
    "custom bump": lambda s: s.call(ops.bump.default, s.x, s.n),
    "custom bump of a row": lambda s: s.call(ops.bump.default, _row(s), 1),
    "custom out": lambda s: s.call(ops.cumsum_into.default, s.x, out=s.y),
}

RANDOM: dict[str, Production] = {
    "rand": lambda s: s.call(aten.rand.default, [s.k, COLUMNS]),
    "torch.randn": lambda s: s.call(torch.randn, s.k, COLUMNS),
    "randn_like": lambda s: s.call(aten.randn_like.default, _float(s)),
    "bernoulli": lambda s: s.call(aten.bernoulli.p, s.x, 0.5),
    "randint": lambda s: s.call(torch.randint, 0, 5, (s.k,)),
    "dropout": lambda s: s.call(aten.dropout.default, s.x, 0.5, True),
    "F.dropout in training": lambda s: s.call(F.dropout, s.x, p=0.5),
    "method bernoulli_": lambda s: s.method("bernoulli_", _fresh(s), 0.5),
    "method uniform_": lambda s: s.method("uniform_", s.x),
    "multinomial": lambda s: s.call(torch.multinomial, s.attribute("inner.offset"), 2),
    "F.rrelu": lambda s: s.call(F.rrelu, s.x, training=True),
    "attention with dropout": lambda s: s.call(F.scaled_dot_product_attention, s.x, s.x, s.x, dropout_p=0.5),
    "custom noise": lambda s: s.call(ops.noise.default, s.x),
}

EFFECTS: dict[str, Production] = {
    "_assert_async": lambda s: s.call(aten._assert_async.msg, s.call(torch.isfinite, s.attribute("scalar")), "scalar"),
    "_assert_async of layout": lambda s: s.call(
        aten._assert_async.default, s.call(aten.all.default, s.call(aten.ge.Tensor, s.x, s.x))
    ),
    "torch._assert": lambda s: s.call(torch._assert, s.call(operator.gt, s.k, -1), "sizes"),
    "_assert_scalar": lambda s: s.call(aten._assert_scalar.default, s.call(operator.ge, s.k, 0), "sizes"),
    "sym_constrain_range": lambda s: s.call(aten.sym_constrain_range_for_size.default, s.k, min=0),
    "custom log": lambda s: s.call(ops.log.default, s.x),
    "autocast": lambda s: _autocast(s),
    "grad mode": lambda s: _grad_mode(s),
}


def _autocast(s: Scope) -> fx.Node:
    """A product in bfloat16 beside the same one in float32."""
    mode = s.call(torch.amp.autocast_mode._enter_autocast, "cpu", torch.bfloat16, True, None)
    made = s.call(torch.mm, s.x, s.call(torch.t, s.x))
    s.call(torch.amp.autocast_mode._exit_autocast, mode)
    return s.call(torch.cat, [made, s.call(torch.mm, s.x, s.call(torch.t, s.x))])


def _grad_mode(s: Scope) -> fx.Node:
    s.call(torch._C._set_grad_enabled, False)
    made = s.call(torch.mul, s.x, 2)
    s.call(torch._C._set_grad_enabled, False)
    return made


DATA_DEPENDENT: dict[str, Production] = {
    "nonzero": lambda s: s.call(aten.nonzero.default, s.x),
    "masked_select": lambda s: s.call(torch.masked_select, s.x, s.call(operator.gt, s.x, 0)),
    "x[mask]": lambda s: s.call(operator.getitem, s.x, s.call(operator.gt, s.x, 0)),
    "item": lambda s: s.call(aten.mul.Tensor, s.y, s.call(aten.item.default, s.call(aten.amax.default, s.x))),
    "method item": lambda s: s.method("item", s.method("max", s.call(aten._to_copy.default, s.x, dtype=torch.int64))),
    "_local_scalar_dense": lambda s: s.call(aten._local_scalar_dense.default, s.call(aten.argmax.default, s.x)),
    "arange of item": lambda s: s.call(
        aten.arange.default, s.call(aten.item.default, s.call(aten.count_nonzero.default, s.x))
    ),
    "repeat_interleave": lambda s: s.call(
        aten.repeat_interleave.Tensor, s.call(aten.clamp.default, s.attribute("counter"), 0, s.n)
    ),
    "tolist": lambda s: s.call(torch.tensor, s.method("tolist", s.x)),
}

# Pure or not, a pass cannot know: they may do anything to what they are given.
FOREIGN: dict[str, Production] = {
    "__add__": lambda s: s.method("__add__", s.x, s.y),
    "__getitem__": lambda s: s.method("__getitem__", s.x, slice(None, 2)),
    "builtin max": lambda s: s.call(max, s.k, 2),
    "F.dropout in evaluation": lambda s: s.call(F.dropout, s.x, 0.5, False),
    "Tensor.add": lambda s: s.call(torch.Tensor.add, s.x, s.y),
    "size iadd": lambda s: s.call(operator.iadd, s.k, s.n % 2),
    "foreign Python": lambda s: s.call(remember, s.x),
    "gumbel_softmax": lambda s: s.call(F.gumbel_softmax, s.x),
    "unique": lambda s: s.call(torch.unique, s.x),
    **{f"module {name}": lambda s, name=name: s.module(name, s.x) for name in MODULES},
}

IMPURE = WRITES | RANDOM | EFFECTS | DATA_DEPENDENT | FOREIGN
