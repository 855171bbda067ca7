"""What an error costs: functions (error (B, C, h, w), snr (B,) float64) → the cost of each number, shaped like the error."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def l2(error: Tensor, snr: Tensor) -> Tensor:
    return error.square()


def l1(error: Tensor, snr: Tensor) -> Tensor:
    return error.abs()


def huber(error: Tensor, snr: Tensor, c: float, schedule: str) -> Tensor:
    """Pseudo-Huber, 2c · (√(e² + c²) − c): l2 of errors below c, 2c · l1 of those above, so that outliers pull less.

    With the schedule `snr`, c rises to 1 on clean pictures, (1 − c) / (1 + σ)² + c, where details are errors above c
    (Khrapov et al. 2024, arXiv 2403.16728, in the words of sd-scripts)."""
    if schedule == "snr":
        root = snr.sqrt()
        c = ((1 - c) * (root / (1 + root)) ** 2 + c).to(error.dtype).to(error.device).view(-1, 1, 1, 1)
    return 2 * c * error.square() / ((error.square() + c ** 2) ** 0.5 + c)      # without the difference of nearly equals


LOSSES = {"l2": l2, "l1": l1, "huber": huber}


def loss(kind: str, **numbers) -> Loss:
    return partial(LOSSES[kind], **numbers)
