"""What a token may see of its own sequence, up to itself: all of it, a window, or a chunk.

Graphs carry a span by its name ("full", "window_512", "chunk_8192"), kernels by one number, its code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar

from autodeploy.errors import OptionError

# A position: an int, an array, a tensor, or a proxy of one.
P = TypeVar("P", bound=Any)


@dataclass(frozen=True)
class Full:
    """Everything from the sequence's first token on."""

    name: ClassVar[str] = "full"
    layer_type: ClassVar[str] = "full_attention"  # as transformers' configurations call it
    longest: ClassVar[None] = None  # the most positions that one token sees; None for no bound
    code: ClassVar[int] = 0

    def first_seen(self, position: P) -> P:
        """The first position that a token at `position` sees; may be negative."""
        return position * 0


@dataclass(frozen=True)
class _Sized:
    size: int
    name: str = field(init=False, repr=False, compare=False)
    sort: ClassVar[str]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise OptionError(f"a {self.sort} of {self.size} tokens", fix="a token sees itself at least")
        # Once and for all, as Dynamo makes no text of a number.
        object.__setattr__(self, "name", f"{self.sort}_{self.size}")

    @property
    def longest(self) -> int:
        return self.size


class Window(_Sized):
    """The last `size` tokens, itself among them (Mistral, arXiv 2310.06825)."""

    sort, layer_type = "window", "sliding_attention"

    @property
    def code(self) -> int:
        return self.size

    def first_seen(self, position: P) -> P:
        return position + 1 - self.size


class Chunk(_Sized):
    """The tokens of its own chunk, where a sequence is cut into chunks of `size` from its start (Llama 4)."""

    sort, layer_type = "chunk", "chunked_attention"

    @property
    def code(self) -> int:
        return -self.size

    def first_seen(self, position: P) -> P:
        return position // self.size * self.size


Span = Full | Window | Chunk
SORTS: tuple[type[Span], ...] = (Full, Window, Chunk)


@cache
def span_of(name: str) -> Span:
    """The span of that name. Raises OptionError for another."""
    sort, _, size = name.partition("_")
    found = {each.sort: each for each in (Window, Chunk)}.get(sort)
    if found and size.isdecimal():
        return found(int(size))
    if name == "full":
        return Full()
    raise OptionError(f"no span is called {name!r}", fix="known: full, window_SIZE, chunk_SIZE")
