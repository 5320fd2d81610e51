"""What a caller can see of a program, and the first difference between two sights of it.

Values by bits (the sign of zero counts, the payload of a NaN does not), dtypes, shapes, strides, offsets, conjugate and
negative bits; which outputs, inputs and attributes share memory; the random generator, autocast and gradient modes. A
program runs twice, the second time on other inputs and on the state that the first run left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG: list[Any] = []  # what functions with effects saw, in order


class State:
    """Tensors of a module, with what is needed to give each its first values, sizes and memory again."""

    def __init__(self, tensors: Iterable[Tensor], owned: Iterable[Tensor] = ()) -> None:
        self.tensors = list(tensors)
        self._owned = list(owned)
        self._first = [(_form(tensor), tensor.untyped_storage()) for tensor in self.tensors]
        storages = {storage._cdata: storage for _, storage in self._first}
        self._bytes = [(storage, storage.clone()) for storage in storages.values()]

    def restore(self) -> None:
        LOG.clear()
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_dtype("cpu", torch.bfloat16)
        for storage, first in self._bytes:
            if len(storage) != len(first):
                storage.resize_(len(first))
            storage.copy_(first)
        for tensor, (form, storage) in zip(self.tensors, self._first, strict=True):
            if _form(tensor) != form or tensor.untyped_storage()._cdata != storage._cdata:
                tensor.data = torch.empty(0, dtype=tensor.dtype).set_(storage, *form)  # type: ignore[call-overload]

    def reload(self) -> None:
        """Other values for what the model owns, as `load_state_dict` gives them: equal tensors are no more."""
        with torch.no_grad():
            for place, tensor in enumerate(self._owned):
                if tensor.dtype is not torch.bool and torch._debug_has_internal_overlap(tensor) == 0:
                    tensor.add_(place % 3)


def tensors_of(value: Any) -> list[Tensor]:
    """A tensor, or those of a module and its submodules, parameters, buffers and plain attributes."""
    if isinstance(value, Tensor):
        return [value]
    held = [{**vars(module), **module._parameters, **module._buffers} for module in value.modules()]
    found = {id(each): each for values in held for each in values.values() if isinstance(each, Tensor)}
    return list(found.values())


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


@dataclass(frozen=True)
class Sight:
    """`values[i]` is a number or a tensor's bits, `forms[i]` all else of it, `memory[i]` the first that shares it."""

    names: list[str]
    forms: list[Any]
    values: list[Any]
    memory: list[int]
    num_calls: int
    around: Any  # the random generator's state and the modes that a run left


def see(
    function: Callable[..., Any], make_inputs: Callable[[int], list[Any]], state: State, max_calls: int = 2
) -> Sight:
    """Run `function` on inputs of variant 0, then 1.

    Raises what the first call raises; a second call that fails is left out.
    """
    state.restore()
    seen: list[tuple[str, Any]] = []
    alive: list[Any] = []  # memory that is freed could be given out again
    forms: list[Any] = []
    values: list[Any] = []
    num_calls = 0
    around: list[Any] = []
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes a millisecond
    for call in range(max_calls):
        if call:
            state.reload()
        inputs = make_inputs(call)
        with torch.no_grad():
            try:
                outputs = function(*inputs)
            except Exception:
                if call == 0 or max_calls == 1:
                    raise
                break
            around.append((_modes(), hash(torch.get_rng_state().numpy().tobytes()), repr(LOG)))
        num_calls += 1
        alive.append((inputs, outputs))
        now = [*_leaves(outputs, f"call {call} output"), *_leaves(inputs, f"call {call} input")]
        now += _leaves(state.tensors, f"call {call} attribute")
        seen += now
        forms += [_describe(value) for _, value in now]
        values += [_kept(value) for _, value in now]
    storages = [_storage(value) for _, value in seen]
    first = {storage: index for index, storage in reversed(list(enumerate(storages)))}
    return Sight([name for name, _ in seen], forms, values, [first[each] for each in storages], num_calls, around)


def _modes() -> Any:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()


def _leaves(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, f"{name}[{index}]")]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{name}[{key!r}]")]
    return [(name, value)]


def _describe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value)
    if value.layout is not torch.strided:
        return (value.layout, value.dtype, tuple(value.shape))
    strides = value.stride() if value.numel() else None
    return (value.dtype, tuple(value.shape), strides, value.storage_offset(), value.is_conj(), value.is_neg())


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_quantized or value.is_meta:
        return repr(value)
    dense = value if value.layout is torch.strided else value.to_dense()
    return dense.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _storage(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.numel():
        return object()  # no element, nothing to be seen through another
    if value.layout is not torch.strided:
        return id(value)
    return value.untyped_storage()._cdata


def difference(want: Sight, got: Sight) -> str | None:
    """The first thing of which a caller could tell `got` from `want`; begins with its kind, up to a colon."""
    if want.names != got.names:
        return f"structure: {want.names} became {got.names}"
    for name, one, other in zip(want.names, want.forms, got.forms, strict=True):
        if one != other:
            return f"form: {name}: {one} became {other}"
    for name, one, other in zip(want.names, want.values, got.values, strict=True):
        if not _same(one, other):
            return f"values: {name}: {one} became {other}"
    if want.memory != got.memory:
        return f"memory: {_groups(want)} became {_groups(got)}"
    if want.around != got.around:
        return f"around: {want.around} became {got.around}"
    return None


def _groups(sight: Sight) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, first in zip(sight.names, sight.memory, strict=True):
        groups.setdefault(first, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return one == other
    if bytes_of(one) == bytes_of(other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bytes_of(_plain_nans(one)) == bytes_of(_plain_nans(other))


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _plain_nans(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return torch.where(tensor != tensor, torch.nan, tensor)
