"""The learning rate as a function of the step: nothing to prepare, save or multiply by the number of processes."""

import math


def constant(progress: float) -> float:
    return 1.0


def linear(progress: float) -> float:
    return 1.0 - progress


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES = {"constant": constant, "linear": linear, "cosine": cosine}


def factor(kind: str, step: int, max_steps: int, warmup_steps: int = 0) -> float:
    """What the learning rate is multiplied by in step 0 … max_steps − 1.

    The warm-up climbs to 1 over `warmup_steps` steps; the shape runs over the rest and reaches its end as the last step ends."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SHAPES[kind]((step - warmup_steps) / max(1, max_steps - warmup_steps))
