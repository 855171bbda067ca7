"""What do the tiny base's latents hold of a fine texture? A decoder can draw no more than that, and what follows from it.

    python scripts/score_latents.py

Encodes pictures that are all texture, pictures of its bands alone (the mean of each 4 × 4 pixels), and pictures of its mean
colour, and says how far apart their latents are, as a share of what latents of plain scenes vary.
"""

import random

import drawings
import numpy as np
import readers
import torch
import world
from PIL import Image

from finetune import registry


@torch.no_grad()
def main() -> None:
    vae = registry.find("families", "sd1").load("tiny").parts["vae"]

    def latents(pictures: list[Image.Image]) -> torch.Tensor:
        """(N, 4, 8, 8), away from the edges."""
        return vae.encode(2 * readers.tensor(pictures) - 1).latent_dist.mode()[..., 4:12, 4:12]

    def cloths(kind: str, grain: int) -> torch.Tensor:
        """Of one in each colour, as `drawings.draw_textured` dyes them, with the mean of each square of `grain` pixels."""
        dark = drawings.texture(kind, random.Random(0)).reshape(64 // grain, grain, 64 // grain, grain).mean((1, 3))
        dark = dark.repeat(grain, 0).repeat(grain, 1)
        cloth = [np.array(colour) * (1 - 0.62 * dark[..., None]) for colour in world.COLOURS.values()]
        return latents([Image.fromarray(c.round().astype(np.uint8)) for c in cloth])

    whole = latents([world.draw(world.random_scene(random.Random(f"latents {i}"))) for i in range(64)]).std().item()
    print(f"{'':<8}  bands  threads")
    for kind in drawings.TEXTURES:
        whole_cloth, bands, flat = (cloths(kind, grain) for grain in (1, 4, 64))
        apart = [(a - b).square().mean().sqrt().item() / whole for a, b in ((bands, flat), (whole_cloth, bands))]
        print(f"{kind:<8} {apart[0]:6.1%} {apart[1]:8.1%}")


if __name__ == "__main__":
    main()
