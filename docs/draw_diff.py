"""Draws docs/smollm2.svg and docs/smollm2.html: what the passes did to SmolLM2-135M-Instruct.

    python docs/draw_diff.py

The page has every pass; the picture is the step of `share_metadata`.
"""

from __future__ import annotations

from pathlib import Path

from autodeploy.models import load_model, resolve_model

import autodeploy as ad

FOLDER = Path(__file__).parent


def main() -> None:
    model, _ = load_model(resolve_model("demo"), None)
    recorder = ad.Recorder()
    ad.apply(ad.trace(model), recorder=recorder)
    history = recorder.trace()
    history.save(FOLDER / "smollm2.html")
    passes = [stage.name for stage in history.stages]
    last = passes.index("share_metadata")
    history.diff(last - 1, last).save(FOLDER / "smollm2.svg")


if __name__ == "__main__":
    main()
