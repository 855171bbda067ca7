"""The learning rate as a function of the step: nothing to prepare, save or multiply by the number of processes.

A shape is a function of (step, steps): 1 at step 0, and what it ends at when the last of `steps` has passed."""

import math


def constant(step: int, steps: int) -> float:
    return 1.0


def linear(step: int, steps: int) -> float:
    return 1.0 - step / steps


def cosine(step: int, steps: int) -> float:
    """Half a cosine (Loshchilov & Hutter 2017, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * (step / steps)))


def cosine_restarts(step: int, steps: int, cycles: int) -> float:
    """`cycles` cosines of one length (Loshchilov & Hutter 2017, eq. 5 with T_mult = 1). The place in the cycle is counted in
    whole numbers: 49·(1/49) is less than 1, and a restart would be a step that learns nothing."""
    return cosine(cycles * step % steps, steps)


def polynomial(step: int, steps: int, power: float) -> float:
    return (1.0 - step / steps) ** power


def wsd(step: int, steps: int, decay: float) -> float:
    """Warm-up, stable, decay: level, then 1 − √x over the last share `decay` (Hägele et al. 2024, section 3)."""
    return 1.0 - math.sqrt(max(0.0, 1.0 - (steps - step) / (decay * steps)))


SHAPES = {"constant": constant, "linear": linear, "cosine": cosine, "cosine_restarts": cosine_restarts,
          "polynomial": polynomial, "wsd": wsd}


def factor(kind: str, step: int, max_steps: int, warmup_steps: int = 0, floor: float = 0.0, **options) -> float:
    """What the learning rate is multiplied by in step 0 … max_steps − 1; `options` are the shape's own.

    The warm-up climbs to 1 over `warmup_steps` steps; the shape runs over the rest, from 1 down to `floor`, and reaches its
    end as the last step ends."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return floor + (1.0 - floor) * SHAPES[kind](step - warmup_steps, max(1, max_steps - warmup_steps), **options)
