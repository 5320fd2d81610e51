"""A backend of your own, with a field of its own: every token attends to all pages of its sequence under one mask.

It is slow and short. Its metadata is written as if there were one layer; the passes see to it that each field is
computed once for all of them. In a package, entry points named `autodeploy.backends` and `autodeploy.fields` would
register the two.

Shapes: T packed tokens, P pages per sequence, p page size, L = P * p, H heads, K key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

import autodeploy as ad
from autodeploy.extend import PagedAttention, Site, field, fields, register_backend, span_of


@field(shape="[T, L] bool", depends="P W", padding="position 0 alone")
def dense_mask(layout: Tensor, num_tokens: int, num_groups: int, page_size: int, span: str) -> Tensor:
    """Which positions of its sequence each token sees."""
    position_T1 = fields.position_ids(layout, num_tokens)[:, None]
    length = fields.block_table(layout, 0, num_groups).shape[1] * page_size
    key_L = torch.arange(length, dtype=torch.int32, device=layout.device)
    return (key_L <= position_T1) & (key_L >= span_of(span).first_seen(position_T1))


class DenseAttention(PagedAttention):
    name = "dense"
    meaning = "one dense mask over all pages of a sequence"

    def why_not(self, site: Site) -> str | None:
        if site.facts.softcap or site.facts.has_sinks or site.facts.has_alibi:
            return "softcap, sinks and ALiBi are left out of the example"
        return super().why_not(site)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        groups, page_size = site.num_groups, site.page_size
        return {
            "slots": fields.slot_mapping(layout, num_tokens, site.group, groups, page_size),
            "pages": fields.block_table(layout, site.group, groups),
            "rows": fields.token_to_seq(layout, num_tokens),
            "mask": dense_mask(layout, num_tokens, groups, page_size, site.span.name),
        }

    def append(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> None:
        for new_1KTD, cache in zip(tensors[1:3], caches, strict=True):
            torch.ops.aten.index_put_.default(cache.flatten(0, 1), [metadata["slots"]], new_1KTD[0].transpose(0, 1))

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        # All pages of each token's sequence: [T, K, L, D].
        pages_TP = metadata["pages"][metadata["rows"]]
        keys_TKLD, values_TKLD = (cache[pages_TP].flatten(1, 2).transpose(1, 2) for cache in caches)
        query_TH1D, mask_T11L = tensors[0].permute(2, 1, 0, 3), metadata["mask"][:, None, None]
        out_TH1D = scaled_dot_product_attention(
            query_TH1D, keys_TKLD, values_TKLD, mask_T11L, scale=site.facts.scale, enable_gqa=True
        )
        return out_TH1D.permute(2, 0, 1, 3)


def main() -> None:
    register_backend(DenseAttention())
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts, answers = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]], {}
    for backend in ("dense", "reference"):
        llm = ad.LLM(model, backend=backend, compile=False)
        answers[backend] = [output.token_ids for output in llm.generate(prompts, ad.SamplingParams(max_tokens=8))]
        print(backend, answers[backend], llm.report.ledger)
    assert answers["dense"] == answers["reference"]


if __name__ == "__main__":
    main()
