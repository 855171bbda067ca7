"""The nouns that flow from the data to the loss.

Shapes: B batch · L tokens · D text width · C latent channels · H W pixels · h w = H W / VAE stride.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the denoiser is told."""

    tokens: Tensor                  # (B, L, D) hidden states of the text encoder
    pooled: Tensor | None = None    # (B, P) for the families that have it
    mask: Tensor | None = None      # (B, L) bool, False where a shorter caption is filled up. None: all are of one length
    beside: Tensor | None = None    # (B, K, h, w) what some networks see beside the noisy latents, see families/_beside.py
    level: Tensor | None = None     # (B,) int64 how noisy that is, which an upscaler is told
    control: Tensor | None = None   # (B, 3, H, W) in [0, 1] what a control branch follows, see families/_control.py


def joined(parts: list[Conditioning]) -> Conditioning:
    """All of them in one batch, in that order. Shorter ones are filled up with zeros that the mask hides."""
    length = max(part.tokens.shape[1] for part in parts)
    fill = [length - part.tokens.shape[1] for part in parts]
    tokens = torch.cat([pad(part.tokens, (0, 0, 0, more)) for part, more in zip(parts, fill)])
    pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
    if not any(fill) and all(part.mask is None for part in parts):
        return Conditioning(tokens, pooled)
    real = [torch.ones_like(part.tokens[..., 0], dtype=torch.bool) if part.mask is None else part.mask for part in parts]
    return Conditioning(tokens, pooled, torch.cat([pad(mask, (0, more)) for mask, more in zip(real, fill)]))


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples at given positions of the run. Exactly one of pixels / latents is set."""

    positions: list[int]                        # B global positions: what seeds every draw of an example
    captions: list[str]                         # B, as the text encoder gets them
    weight: Tensor                              # (B,) float32 factor of each example's loss
    share: float                                # what the sum of their losses is multiplied by, see Loader
    geometry: Tensor                            # (B, 6) original h, w · crop top, left · target h, w
    pixels: Tensor | None = None                # (B, 3, H, W) in [-1, 1]
    latents: Tensor | None = None               # (B, C, h, w) shifted and scaled, as the denoiser wants them
    mask: Tensor | None = None                  # (B, 1, h, w) weight of each latent pixel, 0 … 1. None: all count 1
    conditioning: Conditioning | None = None    # None: the text is encoded in the loop
    beside: Tensor | None = None                # what some networks are shown, see data/beside.py: of inpainting (B, 4, H, W),
    #                                             where to paint and the pixels without that; (B, 3, h, w) a small one; or
    #                                             (B, 3, H, W) in [0, 1] the condition of a control branch


@dataclass(frozen=True, slots=True)
class Losses:
    """What an objective returns."""

    loss: Tensor                    # () to descend
    per_example: Tensor             # (B,) detached, before the example's weight
    timesteps: Tensor               # (B,)
