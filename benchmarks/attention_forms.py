"""Which forms of attention find_attention knows, seen in transformers' models exported as they are.

    python benchmarks/attention_forms.py [TYPE ...] [--implementation eager ... | served] [--output docs/...md]

Each tiny model is exported by torch.export with its own attention code, goes through canonicalize and find_attention,
and is compared with the model at a shape that was not traced. `served` asks instead whether an LLM gives transformers'
greedy tokens for four prompts of mixed length. `wrong` must stay empty. Results of earlier runs are kept beside the
table and only what is named is run again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import zoo
from torch import Tensor, fx
from transformers.utils import logging

import autodeploy as ad
from autodeploy.errors import AutodeployError, NoAttentionFound
from autodeploy.graph.edit import copy_module
from autodeploy.graph.meta import FORM, NEAR_MISS
from autodeploy.trace.aten import from_export
from passes import Canonicalize, FindAttention

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
SERVED = "served"
_TRACED, _ASKED = (2, 12), (3, 19)
_NUM_LAYERS = 2
_TOLERANCE = 1e-4  # of the largest logit
_TIE = 1e-4  # between two logits: rounding may choose either
_EQUAL = "gives transformers' greedy tokens"
_ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / "results" / "attention_forms.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="of zoo.TYPES; all by default")
    parser.add_argument("--implementation", nargs="+", choices=(*IMPLEMENTATIONS, SERVED), default=IMPLEMENTATIONS)
    parser.add_argument("--output", type=Path, default=_ROOT / "docs" / "attention_forms.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    results = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    for implementation in args.implementation:
        for model_type in args.types or zoo.TYPES:
            result = serve(model_type) if implementation == SERVED else examine(model_type, implementation)
            results[f"{model_type} {implementation}"] = result
            print(f"{model_type:24} {implementation:15} {result}", flush=True)
            _RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    args.output.write_text(table(results))


def examine(model_type: str, implementation: str) -> dict[str, Any]:
    """`forms` and `refused` count attentions, `error` is that of logits over the largest, `skipped` a reason."""
    try:
        model = zoo.tiny(model_type, _NUM_LAYERS, implementation)
        raw = _export(model)
    except Exception as error:  # foreign code: what cannot be built or exported is not ours to judge
        return {"skipped": _first_line(error)}
    Canonicalize().apply(raw)
    raw.recompile()
    gm = copy_module(raw)
    try:
        FindAttention().apply(gm)
    except NoAttentionFound:
        return {"refused": _refused(gm)}
    gm.graph.eliminate_dead_code()
    gm.recompile()
    forms = Counter(", ".join(FORM.of(node)) for node in gm.graph.nodes if FORM.on(node))
    return {"forms": forms, "refused": _refused(gm), "error": _error(model, raw, gm)}


def serve(model_type: str) -> dict[str, Any]:
    """`served` says what an LLM did with the model."""
    try:
        model = zoo.tiny(model_type, _NUM_LAYERS)
        model(**_inputs(model, 1, 5))
    except Exception as error:  # foreign code: what does not run in transformers is not ours to judge
        return {"skipped": _first_line(error)}
    prompts = [_inputs(model, 1, length)["input_ids"][0].tolist() for length in (3, 17, 1, 30)]
    try:
        outputs = ad.LLM(model, compile=False).generate(prompts, ad.SamplingParams(max_tokens=20, ignore_eos=True))
    except NoAttentionFound as error:
        return {"served": re.sub(r".*; near misses: [^;]*: ([^;:]*).*", r"\1", error.what)}
    except AutodeployError as error:
        return {"served": error.what.splitlines()[0]}
    answers = zip(prompts, outputs, strict=True)
    return {"served": _EQUAL if all(_is_greedy(model, prompt, out.token_ids) for prompt, out in answers) else "wrong"}


def _is_greedy(model: torch.nn.Module, prompt: list[int], answer: Sequence[int]) -> bool:
    """Whether each token of `answer` is the model's choice behind those before it, or as good as that."""
    inputs = _inputs(model, 1, len(prompt) + len(answer) - 1) | {"input_ids": torch.tensor([[*prompt, *answer[:-1]]])}
    with torch.no_grad():
        logits_TV = model(**inputs).logits[0, len(prompt) - 1 :]
    chosen_T = logits_TV.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return bool((logits_TV.amax(1) - chosen_T <= _TIE).all())


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown: form -> types, reason -> types, and what could not be examined."""
    forms, refused, skipped, served = (defaultdict(set) for _ in range(4))
    wrong = []
    for key, result in results.items():
        model_type, implementation = key.split(" ")
        for form in result.get("forms", ()):
            forms[form].add(model_type)
        for reason in result.get("refused", ()):
            refused[reason].add(model_type)
        if "served" in result:
            served[result["served"]].add(model_type)
        elif "skipped" in result and implementation != SERVED:
            skipped[implementation].add(model_type)
        if result.get("error") is not None and not result["error"] <= _TOLERANCE:
            wrong.append(key)
    unchecked = [key for key, result in results.items() if "forms" in result and result["error"] is None]
    found = sum(sum(result.get("forms", {}).values()) for result in results.values())
    num_types = len({key.split(" ")[0] for key, result in results.items() if result.get("forms")})
    lines = [
        "# Forms of attention",
        "",
        "Generated by `benchmarks/attention_forms.py`: tiny models of transformers with random weights, exported by",
        f"torch.export as they are. {found} attentions of {num_types} model types became canonical; logits at a shape",
        f"that was not traced agree within {_TOLERANCE:g} of the largest. Wrong: {', '.join(wrong) or 'none'}.",
        f"Not compared, as the exported graph itself does not hold at that shape: {', '.join(unchecked) or 'none'}.",
        "",
        "What `ad.LLM` does with a tiny model of each type, and four prompts of mixed length at once:",
        "",
        *_rows("`ad.trace` and `ad.LLM`: the model ...", served),
        "",
        *_rows("Form", forms),
        "",
        *_rows("Refused: the node ...", refused),
        "",
        *_rows("Not exported by torch.export, or not offered by transformers", skipped),
        "",
    ]
    return "\n".join(lines)


def _rows(head: str, types: dict[str, set[str]]) -> list[str]:
    rows = sorted(types.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"| {head} | Model types |", "|---|---|", *(f"| {name} | {', '.join(sorted(t))} |" for name, t in rows)]


def _inputs(model: torch.nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(6, zoo.VOCAB_SIZE - 10, (batch, length), generator=generator)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(length).expand(batch, length).contiguous()
    return inputs


def _export(model: torch.nn.Module) -> fx.GraphModule:
    inputs = _inputs(model, *_TRACED)
    dims = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        return from_export(torch.export.export(model, (), inputs, dynamic_shapes=dims, strict=False))


def _refused(gm: fx.GraphModule) -> dict[str, int]:
    reasons = Counter(NEAR_MISS.of(node) for node in gm.graph.nodes if NEAR_MISS.on(node))
    return {reason: count for reason, count in reasons.items() if not reason.startswith(("is a copy", "is returned"))}


def _error(model: torch.nn.Module, raw: fx.GraphModule, gm: fx.GraphModule) -> float | None:
    """How far `gm` is from the model; None where the exported graph is not right at that shape, either."""
    inputs = _inputs(model, *_ASKED)
    given = [inputs[node.name] for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        expected = model(**inputs).logits
        # Exported graphs with a flex_attention do not run (torch 2.13); some graphs hold for some lengths only.
        if _has_flex(gm) or not (_has_flex(raw) or _agrees(raw, given, expected)):
            return None
        return ((gm(*given) - expected).abs().max() / expected.abs().max()).item()


def _agrees(gm: fx.GraphModule, given: list[Tensor], expected: Tensor) -> bool:
    try:
        return torch.allclose(gm(*given), expected, atol=_TOLERANCE * expected.abs().max().item())
    except RuntimeError:
        return False


def _has_flex(gm: fx.GraphModule) -> bool:
    return bool(gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


if __name__ == "__main__":
    main()
