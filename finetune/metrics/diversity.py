"""How different pictures of one prompt are: mean of 1 − cosine over their pairs."""

import numpy as np

from finetune.metrics.base import Measured, Painted, over_pairs, unit

NEEDS, MODEL, BETTER = {"seeds"}, "facebook/dinov2-base", "higher"


def measure(painted: Painted, eye) -> dict[str, Measured]:
    x, prompts = unit(eye.pictures(painted.pictures)), np.array(painted.prompts)
    return {"diversity": Measured(len(x), over_pairs(1 - x @ x.T, prompts[:, None] == prompts))}
