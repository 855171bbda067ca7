import io

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import pixels
from finetune.data.pixels import UnreadablePicture, fit, plan_crop, read

# what has to be done to a picture stored with that EXIF orientation, as numpy does it
UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
           6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


def stored(orientation: int, suffix: str, tmp_path):
    """A 24 × 16 picture whose four quarters differ, with an orientation."""
    array = np.zeros((16, 24, 3), np.uint8)
    array[:8, :12], array[:8, 12:], array[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(array).save(tmp_path / f"x.{suffix}", exif=exif, **options)
    return tmp_path / f"x.{suffix}", array


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_upright(orientation, suffix, tmp_path):
    file, array = stored(orientation, suffix, tmp_path)
    upright, expected = np.asarray(read(file)).astype(int), UPRIGHT[orientation](array)
    assert upright.shape == expected.shape
    assert np.abs(upright - expected).mean() < 6        # JPEG rings at the edges


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode, tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(2, 0)
    suffix = "png" if mode == "I;16" else "tif"
    array = {"I;16": ramp, "I;16B": ramp.astype(">u2"), "I": ramp.astype(np.int32)}[mode]
    Image.fromarray(array).save(tmp_path / f"x.{suffix}")
    image = read(tmp_path / f"x.{suffix}")
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in (0, 1, 128, 255)] == [(x,) * 3 for x in (0, 1, 128, 255)]


def test_floating_point_pixels_are_refused_not_black(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadablePicture, match="floating point"):
        read(tmp_path / "x.tif")


def rgba(alpha) -> Image.Image:
    return Image.new("RGBA", (4, 4), (200, 0, 0, alpha))


def transparent(how: str) -> tuple[Image.Image, dict]:
    """A picture that is black or red where nobody should see it."""
    black = Image.new("RGB", (4, 4))
    return {"RGBA": (rgba(0), {}), "LA": (Image.new("LA", (4, 4), (0, 0)), {}), "RGB": (black, {"transparency": (0, 0, 0)}),
            "L": (black.convert("L"), {"transparency": 0}), "1": (black.convert("1"), {"transparency": 0}),
            "P": (black.quantize(4), {"transparency": 0}), "P bytes": (black.quantize(4), {"transparency": b"\x00\x00"})}[how]


@pytest.mark.parametrize("how", ["RGBA", "LA", "RGB", "L", "1", "P", "P bytes"])
def test_transparency_is_laid_over_white(how, tmp_path):
    image, options = transparent(how)
    image.save(tmp_path / "x.png", **options)
    assert read(tmp_path / "x.png").getcolors() == [(16, (255, 255, 255))]


def test_half_transparency_is_mixed(tmp_path):
    rgba(128).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png").getpixel((0, 0)) == pytest.approx((227, 127, 127), abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / f"x.{suffix}")
    image = read(tmp_path / f"x.{suffix}")
    assert image.mode == "RGB" and min(image.getpixel((4, 4))) > 250


def test_the_first_frame_of_an_animation_is_the_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("png", "webp", "tif"):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
        assert read(tmp_path / f"x.{suffix}").getpixel((0, 0)) == (255, 0, 0)


def jpeg(size=(200, 200)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "GIF")
    return buffer.getvalue()


BROKEN = {"half a JPEG": jpeg()[:20_000], "half a PNG": png()[:6_000], "a PNG with a wrong byte": png()[:500] + b"?" + png()[501:],
          "nothing": b"", "a web page": b"<!DOCTYPE html><html>404</html>", "a GIF": gif(), "a head": jpeg()[:20]}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_whole_picture_is_refused(what, tmp_path):
    (tmp_path / "x.jpg").write_bytes(BROKEN[what])
    with pytest.raises(UnreadablePicture) as error:
        read(tmp_path / "x.jpg")
    assert str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pillows", [10**9, 10**7])     # ours is lower; Pillow's is
def test_a_small_file_of_very_many_pixels_is_refused(pillows, tmp_path, monkeypatch):
    Image.new("1", (11_000, 11_000)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    with pytest.raises(UnreadablePicture, match="more than 100 million"):
        read(tmp_path / "x.png")


def test_the_limit_is_the_last_that_passes(tmp_path, monkeypatch):
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(pixels, "MAX_PIXELS", 100)
    read(tmp_path / "x.png")
    monkeypatch.setattr(pixels, "MAX_PIXELS", 99)
    with pytest.raises(UnreadablePicture):
        read(tmp_path / "x.png")


@pytest.mark.parametrize("size", [(64, 64), (37, 64), (64, 37), (500, 64), (3, 2), (129, 128)])
@pytest.mark.parametrize("where", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_crop_lies_inside_the_scaled_picture(size, where):
    crop = plan_crop(*size, 32, where)
    width, height = pixels.scaled(*size, 32)
    assert 0 <= crop.top <= height - 32 and 0 <= crop.left <= width - 32 and min(width, height) == 32
    assert crop.geometry == (size[1], size[0], crop.top, crop.left, 32, 32)
    x = fit(Image.new("RGB", size, (255, 128, 0)), crop, False)
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32
    assert x[:, 5, 5].tolist() == pytest.approx([1, 0.004, -1], abs=1e-3)       # no black border came in


def test_pixels_are_the_crop_and_a_flip_is_its_mirror():
    array = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    crop = plan_crop(48, 32, 32, (0.0, 0.25))
    x = fit(Image.fromarray(array), crop, False)
    assert crop.left == 4
    assert torch.equal(x, torch.from_numpy(array[:, 4:36].copy()).permute(2, 0, 1) / 127.5 - 1)
    assert torch.equal(fit(Image.fromarray(array), crop, True), x.flip(2))
