"""From an upright picture to the pixels that are trained: scaled, cut, mirrored.

Shapes: H W pixels · h w = H W / VAE stride.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CENTRE = (0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Crop:
    """A piece of height × width pixels, cut out of a picture that was scaled so that it just covers the piece."""

    original_h: int
    original_w: int
    top: int            # of the piece, in the scaled picture
    left: int
    height: int
    width: int

    def geometry(self, mirrored: bool) -> tuple[int, ...]:
        """Original height and width, top and left, height and width: what SDXL is told (Podell et al. 2023, §2.2). Of a
        mirrored picture, `left` counts from what became its left side."""
        scaled_w, _ = self.scaled
        left = scaled_w - self.width - self.left if mirrored else self.left
        return self.original_h, self.original_w, self.top, left, self.height, self.width

    @property
    def scaled(self) -> tuple[int, int]:
        """Width and height of the scaled picture."""
        factor = max(self.height / self.original_h, self.width / self.original_w)
        return max(self.width, round(self.original_w * factor)), max(self.height, round(self.original_h * factor))


def plan_crop(width: int, height: int, size: tuple[int, int], where: tuple[float, float] = CENTRE) -> Crop:
    """The piece of `size` (height, width) at the fractions (vertical, horizontal) `where` of the room there is."""
    scaled_w, scaled_h = Crop(height, width, 0, 0, *size).scaled
    top, left = (round((side - piece) * f) for side, piece, f in zip((scaled_h, scaled_w), size, where))
    return Crop(height, width, top, left, *size)


def fit(image: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(cut(image, crop, flip))).permute(2, 0, 1).float() / 127.5 - 1


def fit_mask(mask: Image.Image, crop: Crop, flip: bool, stride: int, unmasked: float) -> Tensor:
    """(1, h, w) float32: the weight of each latent pixel, 1 where the mask is white and `unmasked` where it is black."""
    piece = cut(mask, crop, flip).resize((crop.width // stride, crop.height // stride), Image.Resampling.BOX)
    return unmasked + (1 - unmasked) * torch.from_numpy(np.array(piece))[None].float() / 255


def cut(image: Image.Image, crop: Crop, flip: bool = False) -> Image.Image:
    """The piece itself. Pillow's Lanczos averages over the area that it shrinks."""
    image = image.resize(crop.scaled, Image.Resampling.LANCZOS)
    image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    return ImageOps.mirror(image) if flip else image
