"""`verify=True` on models in 16 bits: what rounding explains passes, what it does not is seen."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import tiny
from torch import fx

import autodeploy as ad
from autodeploy.compiler.verify import difference
from autodeploy.errors import PassError
from passes import default


@dataclass(frozen=True)
class Wrong:
    """Gives the last attention another `name`d argument, and says that it may round."""

    argument: str
    value: float
    name: str = "wrong"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        node = gm.graph.find_nodes(op="call_function", target=torch.ops.autodeploy.attention.default)[-1]
        node.kwargs = {**node.kwargs, self.argument: self.value}
        return 1


def in_bfloat16(model_type: str) -> fx.GraphModule:
    return ad.trace(copy.deepcopy(tiny(model_type)).bfloat16())


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "lfm2"])
def test_the_default_pipeline_verifies(model_type: str) -> None:
    """Among them a model with experts, where rounding turns a choice now and then."""
    assert ad.apply(in_bfloat16(model_type), verify=True).report.passes


@pytest.mark.parametrize("wrong", [Wrong("span", "window_2"), Wrong("scale", 0.5)])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_what_is_wrong_is_seen(model_type: str, wrong: Wrong) -> None:
    """The scale is twice what it was."""
    with pytest.raises(PassError, match="pass 'wrong' changed the logits"):
        ad.apply(in_bfloat16(model_type), passes=[wrong, *default()], verify=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_tolerance_follows_from_the_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 1000, generator=generator, dtype=torch.float64) * (torch.finfo(dtype).eps + 2e-5)
    old, near, far = (values.to(dtype) for values in (logits, logits + noise, logits + 10 * noise))
    assert difference(old, near, exact=False) is None
    assert difference(old, near, exact=True)
    assert difference(old, far, exact=False)
    assert difference(old, torch.full_like(old, torch.nan), exact=False)
