"""What greedy decoding has to give, from transformers.

Why one pass over prompt and answer is enough: greedy decoding is a chain in which each token is the argmax of the
logits behind the tokens before it, and a causal model's logits at a position depend on nothing behind it. So an answer
is the one that transformers decodes token by token if, and only if, each of its tokens is the argmax of transformers'
logits at the position before. One pass has them all; it differs from cached decoding by rounding alone, hence `TIE`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

TIE = 1e-4  # between transformers' two best logits: rounding may choose either


def check_greedy(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Assert that every token of `answer` is transformers' choice given those before it; ties are printed."""
    input_ids = torch.tensor([[*prompt, *answer[:-1]]])
    with torch.no_grad():
        logits_TV = model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 :]
    best_T = logits_TV.argmax(-1).tolist()
    assert len(best_T) == len(answer)
    for index, (best, token) in enumerate(zip(best_T, answer, strict=True)):
        if best == token:
            continue
        gap = (logits_TV[index, best] - logits_TV[index, token]).item()
        assert gap <= TIE, f"token {index} after {len(prompt)} is {token}, not {best}, whose logit is {gap:.3g} larger"
        print(f"tie at token {index} after a prompt of {len(prompt)}: {token} and {best} are {gap:.1e} apart")
