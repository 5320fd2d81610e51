"""How much of a GPU the paged attention kernels take: keys of a block, and programs that share a row."""

from __future__ import annotations

from functools import cache

import torch

from autodeploy.kernels.support import power_of_two

# What is assumed of a GPU that is not there: an H100.
_MULTIPROCESSORS, _SHARED_BYTES = 132, 232448
# Bytes of keys in one block: enough 16-byte loads in flight for memory, few enough registers for two programs at once.
_KEY_BYTES = 16384
_MAX_SPLITS = 64


@cache
def multiprocessors(device: torch.device) -> int:
    """How many of them `device` has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _MULTIPROCESSORS


@cache
def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that one program can have on `device`."""
    if device.type != "cuda":
        return _SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def block_keys(size: int, itemsize: int) -> int:
    """Keys in one block, for the larger of key and value size."""
    return min(128, max(16, _KEY_BYTES // (power_of_two(size) * itemsize)))


def num_splits(programs: int, blocks: int, device: torch.device) -> int:
    """Among how many programs to share each row's keys, `blocks` of them at most, when there are `programs` otherwise.

    The fewest that keep the last wave of programs nearly as full as the best number would.
    """
    slots = 2 * multiprocessors(device)
    if programs >= 4 * slots:
        return 1

    def fill(splits: int) -> float:
        return programs * splits / (slots * -(-programs * splits // slots))

    counts = range(1, min(_MAX_SPLITS, max(1, blocks // 2)) + 1)
    enough = 0.9 * max(map(fill, counts))
    return next(splits for splits in counts if fill(splits) >= enough)
