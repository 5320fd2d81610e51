"""The cache tensors of a compiled step, and how many pages a memory budget buys."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import psutil
import torch
from torch import Tensor

from autodeploy.errors import OptionError
from autodeploy.metadata.layout import LayoutSpec
from autodeploy.ops.cache import Cache, PoolSizes
from autodeploy.runtime.pages import pages_needed
from autodeploy.runtime.staging import NUM_ARENAS

# An entry of a Python list and its integer.
_PAGE_BYTES = 40


def allocate_caches(caches: Sequence[Cache], sizes: PoolSizes, device: torch.device) -> tuple[Tensor, ...]:
    """Zeros."""
    return tuple(_zeros(cache.whole(sizes), cache.dtype, device) for cache in caches)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU the operating system hands the memory out as it is touched, so that a big pool is free at once.

    torch.zeros writes every byte: 5.5 s for the default pool of a 24 GiB machine.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def default_num_pages(
    caches: Sequence[Cache],
    layout_spec: LayoutSpec,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_tokens: int,
    memory_bytes: int,
) -> tuple[int, ...]:
    """Pages per KV group: enough for `max_num_seqs` of the longest sequences, or the same share of that for each group.

    All caches take at most `memory_bytes` together. Raises OptionError if one sequence of `max_model_len` does not fit.
    """
    page_size = layout_spec.page_size
    chunk_pages = -(-max_num_tokens // page_size)
    nothing = PoolSizes((0,) * layout_spec.num_groups, page_size, 0)
    state_bytes = _total(caches, nothing._replace(num_slots=max_num_seqs + 1))
    one_page = np.eye(layout_spec.num_groups, dtype=int).tolist()
    page_bytes = [_total(caches, nothing._replace(num_pages=tuple(pages))) for pages in one_page]
    whole = -(-max_model_len // page_size)
    alone = [pages_needed(max_model_len, page_size, span) for span in layout_spec.spans]
    # A span's pages, and those of a prompt's chunk, which is written before the pages behind it are freed.
    wanted = [min(whole, pages + chunk_pages) * max_num_seqs for pages in alone]
    budget = memory_bytes - state_bytes - sum(page_bytes)
    price = sum(count * size for count, size in zip(wanted, page_bytes, strict=True))
    share = min(1.0, max(0, budget) / price) if price else 1.0
    pages = [1 + int(count * share) for count in wanted]
    if any(count <= least for count, least in zip(pages, alone, strict=True)):
        raise OptionError(
            f"{memory_bytes} bytes of cache do not hold one sequence of {max_model_len} tokens",
            where=f"pages per KV group {pages}, needed {[least + 1 for least in alone]}",
            fix="give more memory, or lower max_model_len or max_num_seqs",
        )
    return tuple(pages)


def free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def check_memory(
    caches: Sequence[Cache],
    layout_spec: LayoutSpec,
    device: torch.device,
    *,
    num_pages: Sequence[int],
    max_num_seqs: int,
    max_num_tokens: int,
    max_model_len: int,
) -> None:
    """Refuse what does not fit into the memory that is free, before anything is allocated.

    The caches are on the device; on the host are lists of free pages, block tables, the tokens of running requests, and
    the arenas that a step is packed in. Raises OptionError with the figures.
    """
    of_caches = _total(caches, PoolSizes(tuple(num_pages), layout_spec.page_size, max_num_seqs + 1))
    layout = max_num_seqs * layout_spec.num_columns(-(-max_model_len // layout_spec.page_size))
    host = sum(num_pages) * _PAGE_BYTES + 4 * (max_num_seqs * max_model_len + (NUM_ARENAS + 3) * layout)
    host += 4 * (NUM_ARENAS + 2) * max_num_tokens
    parts = {"cpu": of_caches + host} if device.type == "cpu" else {str(device): of_caches, "cpu": host}
    for place, needed in parts.items():
        free = free_memory(torch.device(place))
        if needed > free:
            raise OptionError(
                f"caches and tables would take {needed / 1e9:,.1f} GB of {place} memory, {free / 1e9:,.1f} GB are free",
                where=f"num_pages {tuple(num_pages)}, max_num_seqs {max_num_seqs}, max_num_tokens {max_num_tokens}",
                fix="lower num_pages, max_num_seqs or max_num_tokens",
            )


def _total(caches: Sequence[Cache], sizes: PoolSizes) -> int:
    """Bytes of all caches."""
    return sum(cache.num_bytes(sizes) for cache in caches)
