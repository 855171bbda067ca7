"""How much an error counts at each noise level, written in x0-space.

A weighting is a function (snr, conversion) → w_x0, all (B,) float64. The loss on the network's own target uses
w_x0 / conversion (see path.py), which makes each of these right for eps, v, flow and whatever comes. Where a paper weighs
errors of eps or of the flow instead, its weight is first brought to x0: an error e of x0 is an error √snr · e of eps, and
(1 + √snr) · e of the flow.
"""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]


def uniform(snr: Tensor, conversion: Tensor) -> Tensor:
    """Every error of the network's own target counts the same (Ho et al. 2020, eq. 14)."""
    return conversion


def min_snr(snr: Tensor, conversion: Tensor, gamma: float) -> Tensor:
    """min(SNR, γ) (Hang et al. 2023, eq. 4): min(snr, γ)/snr for eps, min(snr, γ)/(snr + 1) for v."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, conversion: Tensor, gamma: float) -> Tensor:
    """The same without the corner: half the harmonic mean of SNR and γ (Crowson et al. 2024, with γ = 1/σ_data²)."""
    return snr * gamma / (snr + gamma)


def debiased(snr: Tensor, conversion: Tensor) -> Tensor:
    """1/√SNR for errors of eps (Yu et al. 2024)."""
    return snr.sqrt()


def p2(snr: Tensor, conversion: Tensor, gamma: float, k: float) -> Tensor:
    """1/(k + SNR)^γ for errors of eps (Choi et al. 2022)."""
    return snr / (k + snr) ** gamma


def edm(snr: Tensor, conversion: Tensor, sigma_data: float) -> Tensor:
    """λ(σ) = (σ² + σ_data²) / (σ·σ_data)² (Karras et al. 2022, table 1): what `uniform` is to the F-prediction."""
    return snr + sigma_data ** -2


def sigma_sqrt(snr: Tensor, conversion: Tensor) -> Tensor:
    """1/t² for errors of the flow at t = 1/(1 + √snr); diffusers' word (compute_loss_weighting_for_sd3)."""
    return (1 + snr.sqrt()) ** 4


def cosmap(snr: Tensor, conversion: Tensor) -> Tensor:
    """π_CosMap(t) = 2/(π − 2πt + 2πt²) for errors of the flow (Esser et al. 2024, eq. 22): the law, as a weight."""
    t = 1 / (1 + snr.sqrt())
    return 2 / (math.pi * (1 - 2 * t + 2 * t ** 2)) / t ** 2


WEIGHTINGS = {"uniform": uniform, "min_snr": min_snr, "soft_min_snr": soft_min_snr, "debiased": debiased, "p2": p2,
              "edm": edm, "sigma_sqrt": sigma_sqrt, "cosmap": cosmap}


def weighting(kind: str, **numbers: float) -> Weighting:
    return partial(WEIGHTINGS[kind], **numbers)
