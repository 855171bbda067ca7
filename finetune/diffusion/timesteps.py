"""How often each noise level is trained.

A law is a function from uniform numbers u in [0, 1) to fractions in [0, 1] of the way from clean to noise, both (B,)
float64; a path makes its own time of the fraction (path.py). Every law is the inverse of a distribution function, so
evenly spread u give evenly filled quantiles.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from finetune.diffusion import noise

Law = Callable[[Tensor], Tensor]


def uniform(u: Tensor) -> Tensor:
    """Each noise level equally often."""
    return u


def logit_normal(u: Tensor, scale: float, mean: float = 0.0) -> Tensor:
    """Most often in the middle, never at the ends (Esser et al. 2024, eq. 19). σ = f / (1 − f) is log-normal then."""
    return torch.sigmoid(mean + scale * torch.special.ndtri(u.clamp(2.0 ** -54, 1 - 2.0 ** -53)))


def mode(u: Tensor, scale: float) -> Tensor:
    """More often in the middle (scale > 0) or at the ends (< 0), everywhere sometimes (Esser et al. 2024, eq. 20)."""
    return 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)


def cosmap(u: Tensor) -> Tensor:
    """A rectified flow sees as much of each SNR as the cosine schedule does (Esser et al. 2024, eq. 21)."""
    return 1 - 1 / ((math.pi / 2 * u).tan() + 1)


LAWS = {
    "uniform": uniform, "logit_normal": logit_normal, "mode": mode, "cosmap": cosmap,
    "sigmoid": logit_normal,        # kohya's word, with mean 0
    "log_normal": logit_normal,     # that of Karras et al. 2022, over σ; see path.Edm
}


def law(kind: str, min: float, max: float, **numbers: float) -> Law:
    """The law of that name, laid over the fractions from `min` to `max`."""
    shape = partial(LAWS[kind], **numbers)
    return lambda u: min + (max - min) * shape(u)


def draw(seed: int, positions: list[int], strata: int) -> Tensor:
    """(B,) float64 in [0, 1]: of `strata` consecutive positions, the examples of a step, each draws from another stratum.

    Which one is drawn for each step, so that steps that are not full have no lean."""
    stratum = [int(noise.permutation(strata, seed, p // strata, "stratum")[p % strata]) for p in positions]
    return (torch.tensor(stratum, dtype=torch.float64) + noise.uniforms(seed, positions, "timestep")) / strata


def quantiles(count: int) -> Tensor:
    """(count,) float64: the middles of `count` strata, the same at every validation."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count
