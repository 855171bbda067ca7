"""The noising process and what the network predicts, as four coefficients.

    x_t = a · x0 + b · eps          the network predicts  c · x0 + d · eps

Every weighting of the loss is written once, in x0-space, and `conversion` brings it to the network's own target: an
error e of the target is an error e / (c − d·a/b) of x0, because at a known x_t the noise follows from x0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Path:
    """A discrete variance-preserving process (Ho et al. 2020, eq. 4). `alphas_cumprod`: (T,) float64."""

    alphas_cumprod: Tensor
    prediction: str

    def __post_init__(self):
        assert self.prediction in PREDICTIONS, self.prediction

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, b, c, d at the integer timesteps t (B,), each (B,) float64 on the CPU: not every device has float64."""
        alpha_bar = self.alphas_cumprod[t.cpu()]
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction == "epsilon":
            return a, b, torch.zeros_like(a), torch.ones_like(a)
        return a, b, -b, a                  # v = a · eps − b · x0 (Salimans & Ho 2022, §4)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a² / b², (B,) float64."""
        a, b, _, _ = self.coefficients(t)
        return (a / b) ** 2

    def conversion(self, t: Tensor) -> Tensor:
        """(c − d·a/b)², (B,) float64: w_target = w_x0 / conversion."""
        a, b, c, d = self.coefficients(t)
        return (c - d * a / b) ** 2

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target at t, shaped and typed like x0 (B, …)."""
        a, b, c, d = (k.to(x0.dtype).to(x0.device).view(-1, *[1] * (x0.ndim - 1)) for k in self.coefficients(t))
        return a * x0 + b * noise, c * x0 + d * noise


def ddpm(schedule: str, start: float, end: float, steps: int, prediction: str) -> Path:
    """The path of a scheduler config: `linear` (Ho et al. 2020) or `scaled_linear` (Rombach et al. 2022) betas.

    Raises ValueError for another schedule."""
    if schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start ** 0.5, end ** 0.5, steps, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"unknown beta schedule {schedule!r}")
    return Path(torch.cumprod(1 - betas, 0), prediction)
