"""Trace a model, see what the passes make of it, and let it answer.

    python examples/quickstart.py [MODEL [PROMPT]]

MODEL is "demo" (the default, SmolLM2-135M-Instruct), a folder written by `save_pretrained`, or a Hugging Face hub id.
"""

from __future__ import annotations

import sys

import autodeploy as ad


def main(model: str = "demo", prompt: str = "What is the capital of France?") -> None:
    llm = ad.LLM(model)
    print(prompt)
    for piece in llm.stream(prompt, ad.SamplingParams(max_tokens=64)):
        print(piece, end="", flush=True)
    print(f"\n\n{llm.timings}\n")

    # Prompts of any lengths run together, as one ragged batch without padding between them.
    for output in llm.generate([prompt, "Name three colours."], ad.SamplingParams(max_tokens=16)):
        print(f"{len(output.prompt_token_ids)} tokens in: {output.text!r}")

    # What LLM did inside: one FX graph of the whole model, and the passes on a copy of it.
    gm = ad.trace(llm.model)
    result = ad.apply(gm)
    print(f"\n{result.report}\n")

    # The call that computes all metadata of a step, and one of the nodes that read it.
    code = result.module.code.splitlines()
    for text in ("self.prepare_metadata", "paged_attention"):
        print(next((line.strip() for line in code if text in line), ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
