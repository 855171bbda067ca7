"""What some networks are shown beside noisy latents: the picture without what is to be painted, a small version of it, or
another picture, the condition that a control branch follows.

Shapes: H W pixels · h w = H W / VAE stride.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import avg_pool2d

from finetune.data.pixels import Crop, cut, fit
from finetune.diffusion import noise

LEAST, MOST = 0.05, 0.8     # share of the picture that a random hole covers
WHITE = 128                 # from here on a mask says that something is to be painted, as diffusers has it


def random_hole(height: int, width: int, seed: int, position: int) -> Tensor:
    """(1, H, W) float32, 1 where to paint: boxes, strokes or both, until they cover a share of the picture that is uniform
    between LEAST and MOST."""
    draw = noise.generator(seed, position, "hole")
    canvas = Image.new("L", (width, height))
    pen, wanted, boxes = ImageDraw.Draw(canvas), draw.uniform(LEAST, MOST), draw.choice([0.0, 0.5, 1.0])
    while (missing := wanted - canvas.histogram()[255] / (height * width)) > 0:
        shape = box if draw.random() < boxes else stroke
        shape(pen, height, width, missing, draw)
    return torch.from_numpy(np.array(canvas))[None].float() / 255


def box(pen: ImageDraw.ImageDraw, height: int, width: int, missing: float, draw: np.random.Generator) -> None:
    """A rectangle of a third to all of what is missing, up to three times as long as wide, with its centre anywhere."""
    area, shape = max(0.01, missing * draw.uniform(1 / 3, 1)), 3 ** draw.uniform(-0.5, 0.5)
    w, h = (max(1, round(side * min(1.0, math.sqrt(area) * factor))) for side, factor in ((width, shape), (height, 1 / shape)))
    left, top = (round(draw.uniform(0, side) - length / 2) for side, length in ((width, w), (height, h)))
    pen.rectangle([left, top, left + w - 1, top + h - 1], 255)


def stroke(pen: ImageDraw.ImageDraw, height: int, width: int, missing: float, draw: np.random.Generator) -> None:
    """A brush that wanders and turns, not much longer than what is missing wants; from the border it goes back."""
    side = math.sqrt(height * width)
    thick = max(1.0, side * draw.uniform(0.03, 0.2))
    length = min(3 * side, max(1.0, missing * height * width / thick))
    x, y, heading = draw.uniform(0, width), draw.uniform(0, height), draw.uniform(0, 2 * math.pi)
    dot(pen, x, y, thick)
    while length > 0:
        ahead = min(length, side * draw.uniform(0.05, 0.25))
        was, length, heading = (x, y), length - ahead, heading + draw.normal(0, 0.7)
        if not 0 <= x + ahead * math.cos(heading) <= width:
            heading = math.pi - heading
        if not 0 <= y + ahead * math.sin(heading) <= height:
            heading = -heading
        x, y = x + ahead * math.cos(heading), y + ahead * math.sin(heading)
        pen.line([was, (x, y)], 255, round(thick))
        dot(pen, x, y, thick)


def dot(pen: ImageDraw.ImageDraw, x: float, y: float, thick: float) -> None:
    pen.ellipse([x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], 255)


def fit_hole(mask: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """(1, H, W) float32: 1 where the mask is white."""
    return torch.from_numpy(np.array(cut(mask, crop, flip)) >= WHITE)[None].float()


def without(pixels_3HW: Tensor, hole_1HW: Tensor) -> Tensor:
    """(4, H, W): the hole, and the picture with grey, 0, in it."""
    return torch.cat([hole_1HW, pixels_3HW * (1 - hole_1HW)])


def condition(picture: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """(3, H, W) in [0, 1], which is how diffusers shows it to a ControlNet."""
    return fit(picture, crop, flip) / 2 + 0.5


def small(pixels_3HW: Tensor, stride: int) -> Tensor:
    """(3, h, w): each pixel the mean of those that it stands for."""
    return avg_pool2d(pixels_3HW, stride)
