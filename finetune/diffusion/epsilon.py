"""The noise that is added to a picture; every number of it is drawn by position.

Shapes: B batch · C channels · h w.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.diffusion import noise


@dataclass(frozen=True)
class Epsilon:
    """White noise, and what may be added to it."""

    offset: float = 0.0             # deviation of one number for each channel, to learn brightness (Guttenberg 2023)
    offset_random: bool = False     # each example's offset is a share of that, uniform in [0, 1)
    pyramid: float = 0.0            # factor from each coarser noise to the next (Whitaker 2023, multi-resolution noise)
    perturbation: float = 0.0       # deviation of noise in x_t that the target does not have (Ning et al. 2023)

    def draw(self, shape: tuple[int, ...], seed: int, positions: list[int]) -> Tensor:
        """(B, C, h, w) float32 for a `shape` (C, h, w)."""
        eps = noise.normal(shape, seed, positions, "noise")
        if self.pyramid:
            eps = torch.stack([pyramid(e, self.pyramid, seed, p) for e, p in zip(eps, positions)])
        if self.offset:
            offset = self.offset * noise.normal((shape[0], 1, 1), seed, positions, "offset")
            if self.offset_random:
                offset = offset * noise.uniforms(seed, positions, "offset strength").float().view(-1, 1, 1, 1)
            eps = eps + offset
        return eps

    def perturbed(self, eps: Tensor, seed: int, positions: list[int]) -> Tensor:
        """The noise of x_t, where the target has `eps` (B, C, h, w)."""
        if not self.perturbation:
            return eps
        return eps + self.perturbation * noise.normal(eps.shape[1:], seed, positions, "perturbation")


def pyramid(eps: Tensor, discount: float, seed: int, position: int) -> Tensor:
    """Add noise of 1/r, 1/r², … of the size, discount^level of it, and scale to deviation 1. eps (C, h, w) counts as two, for
    Whitaker's first level has the size of the picture too.

    r is drawn from [2, 4) for each example: with one r for all, the edges of the coarse pixels would always lie alike."""
    (channels, *size), whole = eps.shape, 2 ** 0.5 * eps
    r, level = 2 + 2 * noise.uniform(seed, position, "pyramid"), 0
    while max(size) > 1:
        level += 1
        size = [max(1, int(side / r ** level)) for side in eps.shape[1:]]
        coarse = noise.normal((channels, *size), seed, [position], f"pyramid {level}")
        whole = whole + discount ** level * F.interpolate(coarse, tuple(eps.shape[1:]), mode="bilinear")[0]
    return whole / whole.std()
