"""Integer programs through torch.compile: where a compiler for metadata could be wrong in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._higher_order_ops import while_loop
from torch._inductor import config as inductor_config

# Inductor's own imports use a deprecated part of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with inductor_config.patch(fx_graph_cache=False):
        yield


INTEGER_PROGRAMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "dims": lambda x: ((x.cumsum(0) + 15) // 16 * 2, (x.cumsum(-1) + 15) // 16 * 3),
    "rows and columns": lambda x: (x.select(0, 1) * 2, x.select(1, 1) * 2, x.narrow(0, 1, 2), x.narrow(1, 1, 2)),
    "differences": lambda x: (x.diff(dim=0), x.diff(dim=1), torch.cat([x, x], 0), torch.cat([x, x], 1)),
    "conditions": lambda x: torch.where(x.cumsum(0) % 4 == 0, 4, x.cumsum(-1) % 4),
    "strides": lambda x: torch.as_strided((x + x.t().contiguous().t()) - x, (4,), (1,)),
    "bits": lambda x: ((x + x) - x).view(torch.int32),
    "there and back": lambda x: (x + 7) - x,
    "overflow": lambda x: torch.searchsorted(torch.cumsum(x.int()[0] + 2**30, 0, dtype=torch.int32), x.int()),
    "branches": lambda x: torch.cond(x.sum() > 3, lambda a: a + a.cumsum(0), lambda a: a * 2, (x,)),
    "loops": lambda x: while_loop(lambda i, a: i < 5, lambda i, a: (i + 1, a * 2), (torch.tensor(0), x)),
    "copies": lambda x: (x.to(torch.int64, copy=True), x.to(torch.int64), torch.ops.aten._to_copy(x)),
    "twice": lambda x: (x + 1, 1 + x, x + 1),
}


@pytest.mark.parametrize("name", INTEGER_PROGRAMS)
def test_integer_programs(name: str) -> None:
    """Values, strides, and who shares memory with whom are those of eager."""
    results = [_seen(INTEGER_PROGRAMS[name], backend) for backend in ("eager", "autodeploy")]
    assert results[0] == results[1]


def _seen(program: Callable[[torch.Tensor], Any], backend: str) -> list[Any]:
    x = torch.arange(20).reshape(4, 5)
    outputs = torch.compile(program, backend=backend)(x)
    tensors = [x, *(outputs if isinstance(outputs, tuple) else [outputs])]
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return [
        (tensor.tolist(), tensor.dtype, tensor.stride(), storages.index(storage))
        for tensor, storage in zip(tensors, storages, strict=True)
    ]
