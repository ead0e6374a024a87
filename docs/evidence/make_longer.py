"""Give a text model more positions by interpolation, without training.

Usage: python docs/evidence/make_longer.py MODEL POSITIONS FOLDER

A learned table of positions is interpolated linearly: the new position p stands where p (old - 1) / (new - 1) stood.
Rotary positions are divided by the same factor (Chen et al. 2023, arXiv:2306.15595). Neighbours come closer than the
model has ever seen them, so it reads long inputs, and less well than one that was trained on them. Dropout of
attention weights is switched off: with it torch's CPU kernel forms them all when the model is trained.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from kdtool.models import load_model
from kdtool.pipelines.setup import load_processor
from kdtool.registry import TASKS
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import OutputSection


def main(reference: str, positions: int, folder: Path) -> None:
    """Write the longer model; its other weights are those of the source."""
    run = Run(offline=True)
    for name in ("text-classification", "causal-lm"):
        task = TASKS.get(name)()
        loaded = load_model(reference, task.auto_class, run)
        if not loaded.facts["new_weights"]:
            break
    load_processor(loaded, task, run)
    config: Any = loaded.model.config
    inner = getattr(config, "backbone_config", None) or config
    before = inner.max_position_embeddings
    inner.max_position_embeddings = positions
    for key in ("attention_probs_dropout_prob", "attention_dropout"):
        if getattr(inner, key, None):
            setattr(inner, key, 0.0)
    rope = getattr(inner, "rope_parameters", None)
    if rope:
        inner.rope_parameters = {**rope, "rope_type": "linear", "factor": positions / before}
    state = loaded.model.state_dict()
    for key in [] if rope else [key for key in state if key.endswith("position_embeddings.weight")]:
        table = state[key].float().T[None]
        state[key] = functional.interpolate(table, size=positions, mode="linear", align_corners=True)[0].T
    longer = type(loaded.model)(config).eval()
    longer.load_state_dict(state)
    loaded.model = longer
    loaded.processor.model_max_length = positions
    folder.mkdir(parents=True)
    save_model(loaded, folder, OutputSection())
    with torch.no_grad():
        longer(input_ids=torch.ones(1, positions, dtype=torch.long))
    print(f"{folder}: {before} positions became {positions}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
