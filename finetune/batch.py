"""The nouns that flow from the data to the loss.

Shapes: B batch · L tokens · D text width · C latent channels · H W pixels · h w = H W / VAE stride.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the denoiser is told."""

    tokens: Tensor                  # (B, L, D) hidden states of the text encoder
    pooled: Tensor | None = None    # (B, P) for the families that have it


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples at given positions of the run. Exactly one of pixels / latents is set."""

    positions: list[int]                        # B global positions: what seeds every draw of an example
    captions: list[str]                         # B, as the text encoder gets them
    weight: Tensor                              # (B,) float32 factor of each example's loss
    geometry: Tensor                            # (B, 6) original h, w · crop top, left · target h, w
    pixels: Tensor | None = None                # (B, 3, H, W) in [-1, 1]
    latents: Tensor | None = None               # (B, C, h, w) shifted and scaled, as the denoiser wants them
    conditioning: Conditioning | None = None    # None: the text is encoded in the loop


@dataclass(frozen=True, slots=True)
class Losses:
    """What an objective returns."""

    loss: Tensor                    # () to descend
    per_example: Tensor             # (B,) detached, before the example's weight
    timesteps: Tensor               # (B,)
