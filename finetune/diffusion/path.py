"""The noising process and what the network predicts, as four coefficients.

    x_t = a · x0 + b · eps          the network predicts  c · x0 + d · eps

Every weighting of the loss is written once, in x0-space, and `conversion` brings it to the network's own target: an
error e of the target is an error e / (c − d·a/b) of x0, because at a known x_t the noise follows from x0.

A law (timesteps.py) draws a fraction in [0, 1], from clean to noise; a path makes its own time of it (`time`), and of that
what the network is told (`told`). All of this is float64 on the CPU: not every device has it.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

LEAST_NOISE = 1e-3      # what b counts at least in `snr` and `conversion`: at b = 0 both are infinite, and no weight is
LEAST_SIGMA = 1e-4      # σ of EDM is held between this and its inverse: the network is told its logarithm


class Path(Protocol):
    """What each path says of itself; all else follows, see the functions below. `t` (B,) is a path's own time."""

    prediction: str

    def time(self, fraction: Tensor, pixels: Tensor) -> Tensor:
        """Fraction of the way (B,) float64 in [0, 1] → t (B,); `pixels` (B,) is height × width of each picture."""

    def told(self, t: Tensor) -> Tensor:
        """What the network gets as its timestep, (B,)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, b, c, d at t, each (B,) float64."""


def snr(path: Path, t: Tensor) -> Tensor:
    """Signal-to-noise ratio a² / b², (B,) float64."""
    a, b, _, _ = path.coefficients(t)
    return (a / b.clamp(min=LEAST_NOISE)) ** 2


def conversion(path: Path, t: Tensor) -> Tensor:
    """(c − d·a/b)², (B,) float64: w_target = w_x0 / conversion."""
    a, b, c, d = path.coefficients(t)
    return (c - d * a / b.clamp(min=LEAST_NOISE)) ** 2


def noised(path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t, shaped and typed like x0 (B, …)."""
    a, b = _like(x0, path.coefficients(t)[:2])
    return a * x0 + b * noise


def target(path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should predict, shaped and typed like x0 (B, …)."""
    c, d = _like(x0, path.coefficients(t)[2:])
    return c * x0 + d * noise


def _like(x0: Tensor, coefficients: tuple[Tensor, ...]) -> list[Tensor]:
    return [k.to(x0.dtype).to(x0.device, non_blocking=True).view(-1, *[1] * (x0.ndim - 1)) for k in coefficients]


@dataclass(frozen=True)
class Discrete:
    """A variance-preserving process of T steps (Ho et al. 2020, eq. 4); t is int64. `alphas_cumprod`: (T,) float64.

    Raises ValueError for noise that is predicted where nothing else is left: x_t is the answer, and says nothing of x0."""

    alphas_cumprod: Tensor
    prediction: str

    def __post_init__(self):
        assert self.prediction in PREDICTIONS, self.prediction
        if self.prediction == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise ValueError("epsilon cannot be predicted down to zero signal, where the picture is all noise and a network "
                             "that hands it through is right; v_prediction can")

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def time(self, fraction: Tensor, pixels: Tensor) -> Tensor:
        return (fraction * self.steps).long().clamp(max=self.steps - 1)

    def told(self, t: Tensor) -> Tensor:
        return t

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod[t.cpu()]
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return a, b, *PREDICTIONS[self.prediction](a, b)


PREDICTIONS = {     # (a, b) → (c, d), under the names of diffusers
    "epsilon": lambda a, b: (torch.zeros_like(a), torch.ones_like(a)),
    "v_prediction": lambda a, b: (-b, a),       # v = a · eps − b · x0 (Salimans & Ho 2022, §4)
    "sample": lambda a, b: (torch.ones_like(a), torch.zeros_like(a)),
}


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines, x_t = (1 − t) · x0 + t · eps, and their velocity eps − x0 (Esser et al. 2024, eq. 13); t in [0, 1].

    `shift` draws t towards noise; with `reference`, the side in pixels that it is meant for, more in larger pictures."""

    shift: float = 1.0
    reference: int | None = None
    prediction = "flow"

    def time(self, fraction: Tensor, pixels: Tensor) -> Tensor:
        """Esser et al. 2024, eq. 23: a picture of n times the pixels needs √n times the σ = t / (1 − t) to look as noisy."""
        shift = self.shift * pixels.double().sqrt() / self.reference if self.reference else self.shift
        return shift * fraction / (1 + (shift - 1) * fraction)

    def told(self, t: Tensor) -> Tensor:
        return (1000 * t).float()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = t.cpu()
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class Edm:
    """x0 + σ · eps, scaled to unit variance, and the F-prediction (Karras et al. 2022, eq. 7 and table 1); t is σ.

    A fraction f is σ = f / (1 − f), the noise of a rectified flow at f. So the laws mean the same for both, and a
    logit-normal fraction is Karras' log-normal σ. Data of deviation `sigma_data` are seen and predicted with deviation 1.
    """

    sigma_data: float = 0.5
    prediction = "edm"

    def time(self, fraction: Tensor, pixels: Tensor) -> Tensor:
        return (fraction / (1 - fraction)).clamp(LEAST_SIGMA, 1 / LEAST_SIGMA)

    def told(self, t: Tensor) -> Tensor:
        return (t.log() / 4).float()        # c_noise

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a = c_in, b = c_in · σ; and F = (x0 − c_skip · (x0 + σ·eps)) / c_out, sorted by x0 and eps."""
        t = t.cpu()
        a = (t ** 2 + self.sigma_data ** 2) ** -0.5
        return a, a * t, a * t / self.sigma_data, -a * self.sigma_data


def ddpm(schedule: str | list[float], beta_start: float, beta_end: float, steps: int, prediction: str,
         zero_snr: bool = False) -> Discrete:
    """The path of a schedule, or of `steps` betas of one's own. `zero_snr` rescales it to end without any signal.

    Raises ValueError for what is no schedule."""
    alphas_cumprod = torch.cumprod(1 - betas(schedule, beta_start, beta_end, steps), 0)
    return Discrete(without_signal(alphas_cumprod) if zero_snr else alphas_cumprod, prediction)


def betas(schedule: str | list[float], start: float, end: float, steps: int) -> Tensor:
    """(T,) float64: `linear` (Ho et al. 2020), `scaled_linear` (Rombach et al. 2022), `cosine` (Nichol & Dhariwal 2021)."""
    if isinstance(schedule, list):
        own = torch.tensor(schedule, dtype=torch.float64)
        if len(own) != steps or not ((own > 0) & (own <= 1)).all():
            raise ValueError(f"its {len(own)} betas are not {steps} numbers above 0 and at most 1")
        return own
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start ** 0.5, end ** 0.5, steps, dtype=torch.float64) ** 2
    if schedule in ("cosine", "squaredcos_cap_v2"):     # eq. 17, s = 0.008, and the clip of §3.2
        at = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
        f = (at * math.pi / 2).cos() ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown beta schedule {schedule!r}")


def without_signal(alphas_cumprod: Tensor) -> Tensor:
    """Zero terminal SNR: √ᾱ shifted to end at 0 and scaled to begin as before (Lin et al. 2024, alg. 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def build(kind: str, **fields) -> Path:
    return {"ddpm": partial(ddpm, steps=1000), "rf": RectifiedFlow, "edm": Edm}[kind](**fields)
