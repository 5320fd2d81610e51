"""What backends over caches [pages, p, K, D] on a GPU have in common: Triton writes the new tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from autodeploy.metadata import fields
from autodeploy.ops.kinds.attention import PagedAttention
from autodeploy.ops.site import Site


class TritonPagedAttention(PagedAttention):
    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        slots = fields.slot_mapping(layout, num_tokens, site.group, site.num_groups, site.page_size)
        return super().metadata(layout, num_tokens, site) | {"slot_mapping": slots}

    def append(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> None:
        from autodeploy.kernels.triton_append import append_op  # where Triton is not, a backend says so when asked

        append_op(*tensors[1:3], *caches, metadata["slot_mapping"], metadata["cu_seqlens_q"])
