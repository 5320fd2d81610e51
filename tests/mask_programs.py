"""Random mask functions, written as people write them, and whether what we name them is what they show.

    python tests/mask_programs.py [NUM_FUNCTIONS] [NUM_GRAPHS] [SEED]

Parts are windows, chunks, sinks, prefixes, dilations, tables and rare exceptions, with numbers that are literals,
0-d tensors and one-dimensional tables; they are and-ed and or-ed. Functions go through `read_mask`, graphs of eager,
sdpa and flex attention through `find_attention`.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_graphs import ATTENTION, export
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from autodeploy.attention_forms.asked import Seen
from autodeploy.attention_forms.places import Values, compute
from autodeploy.errors import NoAttentionFound
from autodeploy.metadata.span import Span
from autodeploy.trace.mask import read_mask
from passes import FindAttention

NUM_POSITIONS = 20_000
LENGTHS = (100, 300, 1000, 3000)
BLOCK = 128  # the longest that an exported flex_attention is good for
_DENSE = 3000  # rows and columns that are compared entry by entry; further ones only around the function's numbers
Mask = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Program:
    """`mask` of query and key indices that broadcast; `numbers` are the places at which it may do something."""

    mask: Mask
    numbers: tuple[int, ...]
    text: str


class Generator:
    """Random programs whose numbers stay below `limit`."""

    def __init__(self, seed: int, limit: int) -> None:
        self._random = random.Random(seed)
        self._limit = limit
        self._numbers: list[int] = []

    def program(self) -> Program:
        self._numbers = []
        mask, text = self._part()
        for _ in range(self._random.choice((0, 1, 1, 2, 3))):
            other, more = self._part()
            mask, text = self._joined(mask, other, text, more)
        if self._random.random() < 0.5:
            mask, text = self._joined(mask, lambda q, k: k <= q, text, "causal", "and")
        if self._random.random() < 0.6:
            mask, text = self._joined(mask, lambda q, k: k == q, text, "itself", "or")
        return Program(mask, tuple(self._numbers), text)

    def _joined(self, one: Mask, other: Mask, text: str, more: str, how: str | None = None) -> tuple[Mask, str]:
        how = how or self._random.choice(("and", "and", "or"))
        if how == "and":
            return (lambda q, k: one(q, k) & other(q, k)), f"({text} & {more})"
        return (lambda q, k: one(q, k) | other(q, k)), f"({text} | {more})"

    def _number(self, least: int = 1) -> int:
        most = self._random.choice((8, 64, self._limit // 8, self._limit))
        number = self._random.randint(least, max(least, most))
        self._numbers += [number, 2 * number]
        return number

    def _given(self, number: int) -> int | Tensor:
        """`number` as code holds it: a literal or a tensor without dimensions."""
        return self._random.choice((number, torch.tensor(number)))

    def _part(self) -> tuple[Mask, str]:
        name = self._random.choice([name for name in dir(self) if name.startswith("part_")])
        mask, text = getattr(self, name)()
        return mask, f"{name[5:]}{text}"

    def part_causal(self) -> tuple[Mask, str]:
        how = self._random.randrange(4)
        masks: list[Mask] = [
            lambda q, k: k <= q,
            lambda q, k: ~(k > q),
            lambda q, k: (q - k).float() >= 0,
            lambda q, k: torch.clamp(q - k + 1, 0, 1).bool(),
        ]
        return masks[how], str(how)

    def part_window(self) -> tuple[Mask, str]:
        number = self._number()
        size = self._given(number)
        masks: list[Mask] = [
            lambda q, k: q - k < size,
            lambda q, k: k > q - size,
            lambda q, k: (q - k).abs() < size,
            lambda q, k: (k <= q) & (k + size > q),
        ]
        how = self._random.randrange(4)
        return masks[how], f"{how}({number})"

    def part_chunk(self) -> tuple[Mask, str]:
        number = self._number(2)
        size = self._given(number)
        again = self._random.choice((1, 1, self._number(2)))
        self._numbers += [number * again, 2 * number * again]
        return (lambda q, k: q // size // again == k // size // again), f"({number}, {again})"

    def part_table_of_chunks(self) -> tuple[Mask, str]:
        size = self._number(1)
        ids = torch.arange(NUM_POSITIONS + 1) // size
        return (lambda q, k: ids[q] == ids[k]), f"({size})"

    def part_sinks(self) -> tuple[Mask, str]:
        number = self._number()
        size = self._given(number)
        return (lambda q, k: (k < size) | (k <= q)), f"({number})"

    def part_prefix(self) -> tuple[Mask, str]:
        number = self._number()
        size = self._given(number)
        return (lambda q, k: ((k < size) & (q < size)) | (k <= q)), f"({number})"

    def part_dilation(self) -> tuple[Mask, str]:
        step, rest = self._number(2), self._random.randrange(2)
        return (lambda q, k: (q - k) % step == rest), f"({step}, {rest})"

    def part_all_but_one_pair(self) -> tuple[Mask, str]:
        row, column = self._number(), self._number(0)
        return (lambda q, k: (q != row) | (k != column)), f"({row}, {column})"

    def part_beyond(self) -> tuple[Mask, str]:
        row, column = self._given(self._number()), self._given(self._number())
        return (lambda q, k: ~((q >= row) & (k < column))), f"({int(row)}, {int(column)})"

    def part_marked_keys(self) -> tuple[Mask, str]:
        marked = self._number(0)
        table = torch.ones(NUM_POSITIONS + 1, dtype=torch.bool)
        table[marked] = False
        return (lambda q, k: table[k]), f"({marked})"

    def part_everything(self) -> tuple[Mask, str]:
        return (lambda q, k: (q >= 0) & (k >= 0)), ""


def _closed_form(causal: bool, span: Span, query: Tensor, key: Tensor) -> Tensor:
    values = Values()
    seen = compute(Seen(causal, span).value(values), {values.query: query, values.key: key})
    return seen.expand(torch.broadcast_shapes(query.shape, key.shape))


def ask_function(program: Program) -> str:
    """ "named" or "refused" for what `read_mask` says of a function; "wrong" where it names another one."""
    mask = read_mask(lambda b, h, q, k: program.mask(q, k), NUM_POSITIONS)
    if mask.refused:
        return "refused"
    every = torch.arange(NUM_POSITIONS)
    near = torch.tensor(sorted({n + by for n in (0, NUM_POSITIONS, *program.numbers) for by in range(-2, 3)}))
    near = near[(near >= 0) & (near < NUM_POSITIONS)]
    dense = every[:_DENSE]
    for query, key in ((dense[:, None], dense), (near[:, None], every), (every[:, None], near)):
        told = program.mask(query, key).expand(torch.broadcast_shapes(query.shape, key.shape))
        if not told.equal(_closed_form(mask.causal, mask.span, query, key)):
            return "wrong"
    return "named"


def eager(program: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    return torch.where(program.mask(index[:, None], index), q @ k.mT, -torch.inf).softmax(-1) @ v


def added(program: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    hidden = torch.zeros(()).masked_fill(~program.mask(index[None, :, None], index), torch.finfo(torch.float32).min)
    return (q @ k.mT + hidden).softmax(-1) @ v


def sdpa(program: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=program.mask(index[:, None], index))


def flex(program: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return program.mask(i, j)

    block_mask = create_block_mask(mod, None, None, q.shape[2], q.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=block_mask)  # type: ignore[return-value]


FORMS = (eager, added, sdpa, flex)


def ask_graph(program: Program, form: Callable[..., Tensor], lengths: tuple[int, ...] = LENGTHS) -> str:
    """What find_attention makes of a graph: "named", "bias", "refused", or "wrong" at one of the lengths."""
    inputs = [torch.randn(3, 1, 7, 4) for _ in range(3)]
    gm = export(lambda q, k, v: form(program, q, k, v), tuple(inputs), max_length=BLOCK if form is flex else None)
    try:
        FindAttention().apply(gm)
    except NoAttentionFound:
        return "refused"
    gm.graph.eliminate_dead_code()
    gm.recompile()
    (node,) = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    for length in lengths if form is not flex else (100, BLOCK):
        given = [torch.randn(2, 1, length, 4) for _ in range(3)]
        # float32, values of size one, another order of summation
        if not torch.allclose(form(program, *given), gm(*given), atol=1e-4, equal_nan=True):
            return "wrong"
    return "named" if node.args[4] is None else "bias"


def main() -> None:
    num_functions, num_graphs, seed = (int(arg) for arg in (*sys.argv[1:], "1000", "100", "0")[:3])
    far, near, nearer = (Generator(seed, limit) for limit in (NUM_POSITIONS, LENGTHS[-1], BLOCK))
    counts: Counter[str] = Counter()
    for count in range(num_functions + num_graphs):
        is_function = count < num_functions
        form = FORMS[count % len(FORMS)]
        program = (far if is_function else nearer if form is flex else near).program()
        answer = ask_function(program) if is_function else ask_graph(program, form)
        counts[f"{'function' if is_function else form.__name__}: {answer}"] += 1
        if answer == "wrong":
            print(form.__name__, program.text, flush=True)
    print(dict(sorted(counts.items())))


if __name__ == "__main__":
    main()
