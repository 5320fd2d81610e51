"""Draws what the passes did: docs/smollm2.html (every pass), docs/smollm2.svg and docs/story.svg (`share_metadata`).

    python docs/draw_diff.py

The models have the layers of SmolLM2-135M and of Gemma 3 1B, with fewer and random weights: the graphs are the same.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig

import autodeploy as ad
from autodeploy.viz import Trace

FOLDER = Path(__file__).parent
SMALL = {"vocab_size": 128, "hidden_size": 72, "intermediate_size": 96}
SMOLLM2 = LlamaConfig(**SMALL, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
GEMMA3 = Gemma3TextConfig(
    **SMALL, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512
)


def history(config: PreTrainedConfig) -> Trace:
    """The default passes on a model of this configuration."""
    recorder = ad.Recorder()
    ad.apply(ad.trace(AutoModelForCausalLM.from_config(config).eval()), recorder=recorder)
    return recorder.trace()


def main() -> None:
    smollm2 = history(SMOLLM2)
    smollm2.save(FOLDER / "smollm2.html")
    smollm2.save(FOLDER / "smollm2.svg")
    history(GEMMA3).save(FOLDER / "story.svg")


if __name__ == "__main__":
    main()
