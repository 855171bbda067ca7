"""From a picture file to pixels: decoded in full, upright, RGB, fitted to a square."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune.errors import FinetuneError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000
BACKDROP = (255, 255, 255)      # what transparent pixels are laid over


class UnreadablePicture(FinetuneError):
    """A file that cannot be used as a picture, and why."""

    def __init__(self, file: Path, reason: str):
        super().__init__(f"{file}: not a readable picture ({reason}); repair or remove it")


@dataclass(frozen=True, slots=True)
class Crop:
    """A square cut out of a picture that was scaled so that its short side is `resolution`; all in pixels."""

    original_h: int
    original_w: int
    top: int
    left: int
    resolution: int

    @property
    def geometry(self) -> tuple[int, ...]:
        return self.original_h, self.original_w, self.top, self.left, self.resolution, self.resolution


def read(file: Path) -> Image.Image:
    """The whole picture, upright, 8-bit RGB. Raises UnreadablePicture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadablePicture(file, f"{image.width} × {image.height} pixels, more than {MAX_PIXELS // 10**6} million")
                image.load()            # `verify` passes half a JPEG; only a full decode tells
                image = ImageOps.exif_transpose(image)
                return to_rgb(image)
    except UnreadablePicture:
        raise
    except Image.DecompressionBombError:
        raise UnreadablePicture(file, f"more than {MAX_PIXELS // 10**6} million pixels") from None
    except Exception as e:              # a decoder may fail in any way; the file is the culprit, and it is named
        raise UnreadablePicture(file, str(e).splitlines()[0] if str(e) else type(e).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: 16 bits are scaled (`convert` would clip them), transparency is laid over white."""
    if image.mode == "F":       # nobody says where its white is; `convert` would make 0 … 1 black
        raise ValueError("its pixels are floating point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKDROP, 255)), image)
    return image.convert("RGB")


def plan_crop(width: int, height: int, resolution: int, where: tuple[float, float]) -> Crop:
    """The crop at the fractions (vertical, horizontal) `where` of the room there is; (0.5, 0.5) is the centre.

    Raises FinetuneError for a strip so narrow that scaling it would fill the memory."""
    scaled_w, scaled_h = scaled(width, height, resolution)
    if scaled_w * scaled_h > MAX_PIXELS:
        raise FinetuneError(f"{width} × {height} pixels are too narrow: with the short side at {resolution} they would be "
                            f"{scaled_w} × {scaled_h}; crop the picture")
    top, left = (round((side - resolution) * f) for side, f in zip((scaled_h, scaled_w), where))
    return Crop(height, width, top, left, resolution)


def scaled(width: int, height: int, resolution: int) -> tuple[int, int]:
    factor = resolution / min(width, height)
    return max(resolution, round(width * factor)), max(resolution, round(height * factor))


def fit(image: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """(3, H, W) float32 in [-1, 1]. Pillow's Lanczos averages over the area it shrinks."""
    image = image.resize(scaled(image.width, image.height, crop.resolution), Image.Resampling.LANCZOS)
    image = image.crop((crop.left, crop.top, crop.left + crop.resolution, crop.top + crop.resolution))
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
