"""Picture and training pictures: mean cosine of their DINO features, which tell subjects apart (Ruiz et al. 2023, §4.1)."""

from finetune.metrics.base import Measured, Painted, mean, unit

NEEDS, MODEL, BETTER = {"training"}, "facebook/dinov2-base", "higher"


def measure(painted: Painted, eye) -> dict[str, Measured]:
    return {"dino": mean(unit(eye.pictures(painted.pictures)) @ unit(eye.pictures(painted.training)).mean(0))}
