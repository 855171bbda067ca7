"""From the bytes of a picture file to an upright 8-bit sRGB picture.

A folder of pictures from anywhere holds every kind of file. Either the pixels that its author saw come out, or an
UnreadablePicture that says why not: nothing in between, no other exception, no warning, and no more memory than planned.
This module is imported by many small processes: no torch.

Of colours, ICC profiles are followed; gAMA, cHRM, cICP (HDR) and gain maps are not.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial, reduce

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError

from finetune.errors import FinetuneError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")
STARTS = {b"\xff\xd8": (".jpg", ".jpeg"), b"\x89PNG": (".png",), b"RIFF": (".webp",), b"BM": (".bmp",),
          b"II": (".tif", ".tiff"), b"MM": (".tif", ".tiff")}       # of a file's bytes; AVIF is what is left
MEMORY = 520 * 2**20        # bytes for one picture with its file; with Python, Pillow and numpy it stays below 600 MiB
TEXT = 2**23                # bytes of text in a PNG, unpacked
BAND = 2**20                # pixels that are converted at a time
ORIENTATION = 0x0112
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}    # bytes a pixel in Pillow; else 4
SRGB = ImageCms.createProfile("sRGB")

# what Pillow grumbles about is read anyway, or refused with a reason of ours
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class UnreadablePicture(FinetuneError):
    """A file that cannot be used as a picture, and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)      # as they are: so it survives the way back from a worker process
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: not a readable picture ({self.reason}); repair or remove it"


@dataclass(frozen=True)
class Reading:
    """How pictures are read: the recipe's data.pixels."""

    background: tuple[int, int, int] = (255, 255, 255)      # what transparent pixels are laid over
    first_frame: bool = False                               # of an animation its first frame, instead of unreadable
    max_pixels: int = 100_000_000


def read(data: bytes, name: str, how: Reading = Reading()) -> Image.Image:
    """The whole picture, upright, 8-bit RGB in sRGB. Raises UnreadablePicture.

    An embedded ICC profile is followed (relative colorimetric, with black point compensation, as Photoshop does). One that
    is broken, or made for another kind of pixels, is taken for a slip of the program that wrote it and for sRGB, which is
    what a browser shows."""
    with refusing(name):
        image = upright(decoded(data, how), how)
        profile = image.info.get("icc_profile")
        if image.mode == "RGB" and "transparency" not in image.info:
            if transform := to_srgb(profile, "RGB"):
                transform.apply_in_place(image)
        else:
            image = laid_over(how.background, image, "RGB", partial(rgb, profile=profile))
        image.info = {}         # the profile and the orientation are no longer true
        return image


def alpha(data: bytes, name: str, how: Reading = Reading()) -> Image.Image | None:
    """How opaque each pixel is, upright, 8-bit grey; None for a picture without transparency. Raises UnreadablePicture."""
    with refusing(name):
        return opacity(upright(decoded(data, how), how))


def mask(data: bytes, name: str, how: Reading = Reading()) -> Image.Image:
    """A mask, upright, 8-bit grey: the luminance of its numbers as they stand, without a colour profile. Transparent
    pixels are black, for nobody marked them. Raises UnreadablePicture."""
    with refusing(name):
        image = upright(decoded(data, how), how)
        return image if image.mode == "L" and "transparency" not in image.info else laid_over(0, image, "L", grey)


def suffixes(data: bytes) -> tuple[str, ...]:
    """Those that fit the content of a readable picture."""
    return next((fitting for start, fitting in STARTS.items() if data.startswith(start)), (".avif",))


def shrunk(image: Image.Image) -> Image.Image:
    """To 9 × 8, for its difference hash."""
    return image.resize((9, 8), Image.Resampling.BOX)


def difference_hashes(small: Sequence[Image.Image]) -> np.ndarray:
    """(N,) of 64 bits that scaling, compression and a little retouching hardly change: where a pixel of the shrunk picture
    is brighter than the one to its left (Krawetz 2013). All pictures of one colour have 0."""
    column = Image.new("RGB", (9, 8 * len(small)))      # one picture, for each call of Pillow costs as much as its pixels
    for n, image in enumerate(small):
        column.paste(image, (0, 8 * n))
    grey = np.asarray(column.convert("L")).reshape(-1, 8, 9)
    return np.packbits(grey[..., 1:] > grey[..., :-1]).view(">u8").astype(np.uint64)


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """A decoder may fail in any way; the file is the culprit, and it is named."""
    try:
        yield
    except MemoryError:
        raise UnreadablePicture(name, "there is not enough memory for it") from None
    except Exception as e:
        raise UnreadablePicture(name, str(e).strip().split("\n")[0] or type(e).__name__) from None


def decoded(data: bytes, how: Reading) -> Image.Image:
    """Every pixel, as stored: `verify` passes half a JPEG, only a full decode tells."""
    # Pillow's settings for the whole process, which some other library may have changed: our own limit decides alone
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_MEMORY = None, False, TEXT
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it cannot be opened as {', '.join(FORMATS)}; it begins with {data[:12]!r}") from None
    if image.width * image.height > how.max_pixels:
        raise ValueError(f"{image.width} × {image.height} are more than {how.max_pixels:,} pixels; make it smaller, or "
                         "raise data.pixels.max_megapixels")
    if getattr(image, "is_animated", False) and image.format != "MPO" and not how.first_frame:     # MPO: a JPEG with extras
        raise ValueError(f"it has {image.n_frames} frames or pages; data.pixels.animated: first takes the first")
    if image.mode == "F":       # nobody says where its white is
        raise ValueError("its pixels are floating point numbers; save it with 8 or 16 bits")
    if image.format == "TIFF" and image.mode[:4] == "I;16" and (image.tag_v2[258] == (12,) or not image.tag_v2.get(262)):
        raise ValueError("grey of 12 bits, or of 16 with white as zero; save it as PNG")
    converting = 4 + (0 if image.mode == "RGB" and "transparency" not in image.info else STORED.get(image.mode, 4))
    afford(image, len(data) + image.width * image.height * max(decoding(image, data), converting), how)
    depth = data[24] if image.format == "PNG" else 8
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:    # only Adobe's ink is inverted
        image.tile = [image.tile[0]._replace(args=("CMYK", ""))]
    image.load()
    key = image.info.get("transparency")
    if depth != 8 and isinstance(key, (int, tuple)) and image.mode in ("L", "RGB"):     # Pillow scales the pixels alone
        image.info["transparency"] = tuple(k >> 8 for k in key) if depth == 16 else key * 255 // (2**depth - 1)
    return image.copy() if image.format in ("WEBP", "AVIF") else image      # they hold on to their decoder


def afford(image: Image.Image, needed: float, how: Reading) -> None:
    """A limit raised by the user is taken as leave for as much more memory."""
    budget = MEMORY * max(1, how.max_pixels / Reading.max_pixels)
    if needed > budget:
        raise ValueError(f"{image.width} × {image.height} pixels of this kind ({image.format or ''} {image.mode}) take "
                         f"{needed / 2**20:.0f} MiB to read, more than {budget / 2**20:.0f}; make it smaller, or raise "
                         "data.pixels.max_megapixels, and the memory with it")


def decoding(image: ImageFile.ImageFile, data: bytes) -> float:
    """Bytes a pixel that the decoder takes at its worst, the picture included: measured, 2026."""
    stored = STORED.get(image.mode, 4)
    if image.format in ("WEBP", "AVIF"):
        return 17 + len(data) / (image.width * image.height)        # two canvases, their bytes, a copy of the file
    if image.format in ("JPEG", "MPO"):
        layers = len(image.layer)
        scan = image.fp.tell() - 2 * layers - 8
        if image.info.get("progressive") or data[scan:scan + 2] != b"\xff\xda":      # coefficients wait for the last scan
            sampling = [h * v for _, h, v, _ in image.layer]
            stored += 2 * sum(sampling) / max(sampling)
    if image.format == "TIFF":
        tags, strip = image.tag_v2, image.width * min(image.tag_v2.get(278, image.height), image.height)
        if image.tile[0][0] == "libtiff":       # unpacks a whole strip or tile at a time
            bits = tags.get(258, (1,))
            bits = max(sum(bits), bits[0] * tags.get(277, 1), 32 * (tags.get(262) == 6))
            strip = tags.get(322, 0) * tags.get(323, 0) or strip
            stored += bits / 8 * strip / (image.width * image.height)
        if orientation(image) != 1:             # Pillow turns it while loading
            stored = max(stored, 2 * STORED.get(image.mode, 4))
    return stored


def orientation(image: Image.Image) -> int:
    """As the picture's EXIF has it; 1, upright, where that is missing or broken."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:       # hand-made parsing of hostile bytes; the pixels are sound
        return 1


def upright(image: Image.Image, how: Reading) -> Image.Image:
    method = UPRIGHT.get(orientation(image))
    if method is None:
        return image
    afford(image, 2 * STORED.get(image.mode, 4) * image.width * image.height, how)
    return image.transpose(method)


def laid_over(background: int | tuple[int, ...], image: Image.Image, mode: str,
              convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The picture, converted, over the background: a band at a time, for a whole copy can be 400 MB."""
    flat = Image.new(mode, image.size, background)
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        band = image.crop(box)
        opaque = opacity(band)
        band.info.pop("transparency", None)
        flat.paste(convert(band), box, opaque)
    return flat


def opacity(image: Image.Image) -> Image.Image | None:
    """Its alpha channel, or what a palette or a colour key says; None for none."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return image.getchannel(image.getbands()[-1])
    key = image.info.get("transparency")
    if key is None:
        return None
    if isinstance(key, bytes):      # one for each colour of the palette
        return image.point(list(key.ljust(256, b"\xff")), "L")
    if image.mode.startswith("I"):
        return Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    bands = image.convert("L").split() if image.mode == "1" else image.split()
    keys = key if isinstance(key, tuple) else (key,)
    return reduce(ImageChops.lighter, (band.point([255 * (value != key) for value in range(256)], "L")
                                       for band, key in zip(bands, keys)))


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey is scaled; `convert` would clip it."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits; save it as PNG")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def grey(image: Image.Image) -> Image.Image:
    image = eight_bits(image)
    return image.convert("L") if image.mode != "La" else image.convert("LA").convert("L")


def rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """In sRGB, whatever is transparent."""
    image = eight_bits(image)
    if image.mode in ("LA", "La"):
        image = grey(image)
    elif image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("RGBA").convert("RGB") if image.mode == "RGBa" else image.convert("RGB")
    transform = to_srgb(profile, image.mode)
    return transform.apply(image) if transform else image.convert("RGB")


@lru_cache(16)
def to_srgb(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours; None where they are sRGB, or there is no use in the profile. Photos share few profiles,
    and a transform takes milliseconds to make."""
    if profile is None and mode != "LAB":
        return None
    try:
        source = ImageCms.createProfile("LAB") if mode == "LAB" else ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, SRGB, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
                                            ImageCms.Flags.BLACKPOINTCOMPENSATION)
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):
        return None
    colours = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).astype(np.uint8)] * 3), -1).reshape(27, 27, 3)
    same = mode == "RGB" and np.abs(np.asarray(transform.apply(Image.fromarray(colours))).astype(int) - colours).max() <= 2
    return None if same else transform
