"""What do the tiny base's latents hold of a fine texture? A decoder can draw no more than that.

    python scripts/score_latents.py

Encodes pictures that are all texture beside pictures that are all of its mean colour, and says how far apart the latents
are, and how much they vary inside of one (the pattern itself), both as a share of what latents of plain scenes vary.
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

    def cloths(kind: str, flat: bool) -> list[Image.Image]:
        """One in each colour, as `drawings.draw_textured` dyes them."""
        dark = drawings.texture(kind, random.Random(0))
        dark = np.full_like(dark, dark.mean()) if flat else dark
        cloth = [np.array(colour) * (1 - 0.62 * dark[..., None]) for colour in world.COLOURS.values()]
        return [Image.fromarray(c.round().astype(np.uint8)) for c in cloth]

    whole = latents([world.draw(world.random_scene(random.Random(f"latents {i}"))) for i in range(64)]).std().item()
    print(f"{'':<8} from flat  inside")
    for kind in drawings.TEXTURES:
        rough, flat = latents(cloths(kind, False)), latents(cloths(kind, True))
        apart, inside = (rough - flat).square().mean().sqrt().item(), rough.std((2, 3)).mean().item()
        print(f"{kind:<8} {apart / whole:9.1%} {inside / whole:7.1%}")


if __name__ == "__main__":
    main()
