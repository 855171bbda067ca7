"""Picture and training pictures: mean cosine of their CLIP features (Ruiz et al. 2023, §4.1)."""

from finetune.metrics.base import Measured, Painted, mean, unit

NEEDS, MODEL, BETTER = {"training"}, "openai/clip-vit-large-patch14", "higher"


def measure(painted: Painted, eye) -> dict[str, Measured]:
    return {"clip_i": mean(unit(eye.pictures(painted.pictures)) @ unit(eye.pictures(painted.training)).mean(0))}
