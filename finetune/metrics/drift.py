"""Prior drift: how far pictures of plain prompts, which name nothing learned, are from the base's of the same seeds."""

from finetune.metrics.base import Measured, Painted, distances, mean

NEEDS, MODEL, BETTER = {"plain"}, "facebook/dinov2-base", "lower"


def measure(painted: Painted, eye) -> dict[str, Measured]:
    return {"drift": mean(distances(eye.pictures(painted.plain), eye.pictures(painted.base)))}
