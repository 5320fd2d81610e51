"""What tells one tensor's values from another's, without keeping them: a hash."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_PLAIN = (Tensor, torch.nn.Parameter)


class Hashes:
    """Hashes of tensors, each made once as long as torch counts no write to it; a write through `.data` is not counted.

    About 1 GB a second; what is on a GPU is copied.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()  # of each tensor: how often it had been written to, and its hash then

    def of(self, held: object) -> str:
        """That of a tensor, or of all in a module; empty where there are no values, as on the meta device."""
        if isinstance(held, torch.nn.Module):
            tensors = [*held.named_parameters(), *held.named_buffers()]
            return _text("\n".join(f"{name} {self.of(tensor)}" for name, tensor in tensors).encode()) if tensors else ""
        if type(held) not in _PLAIN or not isinstance(held, Tensor):
            return ""
        if held.device.type == "meta" or held.layout != torch.strided:
            return ""
        version = -1 if held.is_inference() else held._version
        known = self._known.get(held)
        if known is None or version < 0 or known[0] != version:
            flat = held.detach().cpu().contiguous().reshape(-1)
            known = (version, _text(flat.view(torch.uint8).numpy().data))
            self._known[held] = known
        return known[1]


def _text(data: bytes | memoryview) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()[:12]
