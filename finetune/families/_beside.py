"""What a network sees beside noisy latents, made of what the data room shows (data/beside.py) as diffusers makes it.

Shapes: B batch · C latent channels · H W pixels · h w = H W / VAE stride.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from finetune.diffusion import noise


def painting(family, shown_B4HW: Tensor, seed: int, positions: list[int]) -> dict[str, Tensor]:
    """`beside` (B, 1 + C, h, w): where to paint, and the latents of the picture without that."""
    moments = family.moments(shown_B4HW[:, 1:])
    drawn = noise.normal((moments.shape[1] // 2, *moments.shape[2:]), seed, positions, "posterior beside")
    latents = family.latents(moments, drawn.to(moments.device))
    return {"beside": torch.cat([interpolate(shown_B4HW[:, :1], latents.shape[2:]).to(latents.device), latents], 1)}


def enlarging(family, shown_B3hw: Tensor, seed: int, positions: list[int]) -> dict[str, Tensor]:
    """`beside` (B, 3, h, w): the small picture with noise, as much as its `level` (B,) says, which is uniform below the
    pipeline's most: the noise augmentation of Ho et al. 2022 (Cascaded Diffusion Models, §4.1)."""
    level = (noise.uniforms(seed, positions, "noise level") * family.most_noise).long().to(shown_B3hw.device)
    drawn = noise.normal(shown_B3hw.shape[1:], seed, positions, "noise beside").to(shown_B3hw)
    return {"beside": family.small_scheduler.add_noise(shown_B3hw, drawn, level), "level": level}
