"""Pixels and latents, the same in every family: a VAE, and the shift and scale between its latents and those of a denoiser.

Shapes: B batch · C latent channels · H W pixels · h w = H W / VAE stride.
"""

import torch
from torch import Tensor


def config(family) -> dict:
    """That of the VAE, which itself may have been let go."""
    return family.source.config("vae")


def stride(family) -> int:
    """Pixels per latent, along each axis."""
    return 2 ** (len(family.vae_config.get("block_out_channels", [64])) - 1)


@torch.no_grad()
def moments(family, pixels_B3HW: Tensor) -> Tensor:
    """Mean and log-variance of the VAE's posterior, (B, 2C, h, w) float32; the same inside the loop as before it."""
    vae = family.parts["vae"]
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixels_B3HW.to(vae.device, vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1).float()


def sample(family, moments: Tensor, noise_BChw: Tensor) -> Tensor:
    """A sample of the posterior as the denoiser wants it, (B, C, h, w); `noise` is standard normal."""
    mean, logvar = moments.chunk(2, 1)
    config = family.vae_config
    shift, scale = config.get("shift_factor") or 0, config.get("scaling_factor", 0.18215)   # diffusers' own, if it is silent
    return (mean + (0.5 * logvar).exp() * noise_BChw - shift) * scale
