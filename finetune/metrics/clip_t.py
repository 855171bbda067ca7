"""Text and picture: cosine between CLIP's features of the prompt and of the picture (Radford et al. 2021)."""

from finetune.metrics.base import Measured, Painted, mean, unit

NEEDS, MODEL, BETTER = set(), "openai/clip-vit-large-patch14", "higher"


def check(prompts: list[str], eye) -> None:
    """Raise FinetuneError for an eye that cannot read these."""
    eye.texts(prompts)


def measure(painted: Painted, eye) -> dict[str, Measured]:
    return {"clip_t": mean((unit(eye.pictures(painted.pictures)) * unit(eye.texts(painted.prompts))).sum(1))}
