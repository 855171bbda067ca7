"""How much an error counts at each noise level, written in x0-space.

A weighting is a function (snr, conversion) → w_x0, all (B,) float64. The loss on the network's own target uses
w_x0 / conversion (see path.py), which makes each of these right for eps, v and whatever comes.
"""

from functools import partial
from typing import Callable

from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]


def uniform(snr: Tensor, conversion: Tensor) -> Tensor:
    """Every error of the network's own target counts the same (Ho et al. 2020, eq. 14)."""
    return conversion


def min_snr(snr: Tensor, conversion: Tensor, gamma: float) -> Tensor:
    """min(SNR, γ) (Hang et al. 2023, eq. 4): min(snr, γ)/snr for eps, min(snr, γ)/(snr + 1) for v."""
    return snr.clamp(max=gamma)


def weighting(kind: str, gamma: float = 5.0) -> Weighting:
    """The weighting of that name."""
    return {"uniform": uniform, "min_snr": partial(min_snr, gamma=gamma)}[kind]
