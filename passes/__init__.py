"""The passes, and the one list that says in which order they run."""

from __future__ import annotations

from collections.abc import Mapping

from autodeploy.graph.edit import Pass
from passes.canonicalize import Canonicalize
from passes.find_attention import FindAttention
from passes.find_latent_attention import FindLatentAttention
from passes.gather_logits import GatherLogits
from passes.insert_cached_attention import InsertCachedAttention
from passes.lower_fields import LowerFields
from passes.lower_linear import LowerLinear
from passes.nest_inputs import NestInputs
from passes.share_metadata import ShareMetadata
from passes.specialize_step import SpecializeStep

__all__ = [
    "Canonicalize",
    "FindAttention",
    "FindLatentAttention",
    "GatherLogits",
    "InsertCachedAttention",
    "LowerFields",
    "LowerLinear",
    "NestInputs",
    "ShareMetadata",
    "SpecializeStep",
    "default",
]


def default(backend: str | Mapping[str, str] = "auto", page_size: int | None = None) -> list[Pass]:
    """The pipeline, read top to bottom."""
    return [
        Canonicalize(),
        FindAttention(),
        FindLatentAttention(),
        NestInputs(),
        GatherLogits(),
        InsertCachedAttention(backend, page_size),
        ShareMetadata(),
        LowerFields(),
        LowerLinear(),
    ]
