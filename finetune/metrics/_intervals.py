"""How much of a number is chance: intervals of numbers and of paired differences, at LEVEL.

They speak of these prompts with other seeds, and take pictures for independent. Shapes: N pictures, R resamples.
"""

from math import sqrt
from statistics import NormalDist

import numpy as np

from finetune.metrics.base import Measured

RESAMPLES, LEVEL = 2000, 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
NONE = np.nan, np.nan


def facts(measured: Measured, other: Measured | None = None) -> dict[str, float | None]:
    """`value`, `low` and `high` of the number, or of how much more it is than the `other`; None for what cannot be told."""
    assert other is None or other.size == measured.size, "only pictures of the same jobs are paired"
    once = np.ones((1, measured.size))
    point = float((measured.of(once) - (other.of(once) if other else 0))[0])
    if measured.right is not None:
        low, high = paired_shares(measured.right, other.right) if other else wilson(measured.right)
    elif measured.resampled:
        w_RN = resamples(measured.size)
        low, high = expanded(measured.of(w_RN) - (other.of(w_RN) if other else 0), measured.size)
    else:
        low, high = NONE
    return {key: None if np.isnan(x) else float(x) for key, x in (("value", point), ("low", low), ("high", high))}


def resamples(size: int) -> np.ndarray:
    """(R, N) how often each picture counts when N are drawn anew with replacement: the same for everything of that size, so
    that differences are paired."""
    return np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(float)


def expanded(found_R: np.ndarray, size: int) -> tuple[float, float]:
    """The bootstrap's expanded percentile interval (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"): as wide
    as Student's t has it, for the plain percentiles of few pictures are too narrow."""
    if size < 2 or np.isnan(found_R).all():
        return NONE
    v = size - 1
    t = Z + (Z**3 + Z) / (4 * v) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * v**2)     # Abramowitz & Stegun 26.7.5
    outside = NormalDist().cdf(-t * sqrt(size / v))
    return tuple(np.nanquantile(found_R, [outside, 1 - outside]).tolist())


def wilson(right_N: np.ndarray) -> tuple[float, float]:
    """Of a share (Wilson 1927): drawn anew, all that is right stays all right, and the bootstrap would be sure of 100 %."""
    counted = right_N[~np.isnan(right_N)]
    if not (n := len(counted)):
        return NONE
    p = counted.mean()
    middle, half = p + Z**2 / (2 * n), Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n))


def paired_shares(a_N: np.ndarray, b_N: np.ndarray) -> tuple[float, float]:
    """Of a's share less b's, of the same pictures (Newcombe 1998, method 8): Wilson's intervals, and how they go together."""
    both = ~np.isnan(a_N) & ~np.isnan(b_N)
    a, b = a_N[both], b_N[both]
    if not len(a):
        return NONE
    p, q, (la, ua), (lb, ub) = a.mean(), b.mean(), wilson(a), wilson(b)
    spread = sqrt(p * (1 - p) * q * (1 - q))
    together = ((a * b).mean() - p * q) / spread if spread > 1e-12 else 0.0

    def reach(x: float, y: float) -> float:
        return sqrt(max(0.0, x**2 - 2 * together * x * y + y**2))

    return p - q - reach(p - la, ub - q), p - q + reach(ua - p, q - lb)
