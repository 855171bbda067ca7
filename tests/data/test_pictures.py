"""Reading one picture; test_hostile.py reads a folder of all kinds."""

import io
import pickle
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from finetune.data import pictures
from finetune.data.pictures import Reading, UnreadablePicture, alpha, difference_hashes, mask, shrunk

read = partial(pictures.read, name="x")
# what has to be done to a picture stored with that EXIF orientation, as numpy does it
UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
           6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


def saved(image: Image.Image | np.ndarray, form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def noise(height=64, width=64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_upright(orientation, form):
    array = np.zeros((16, 24, 3), np.uint8)
    array[:8, :12], array[:8, 12:], array[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    upright = np.asarray(read(saved(array, form, exif=turned(orientation), **options))).astype(int)
    expected = UPRIGHT[orientation](array)
    assert upright.shape == expected.shape
    assert np.abs(upright - expected).mean() < 6        # JPEG rings at the edges


def test_what_is_read_is_not_turned_or_recoloured_once_more():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = read(saved(noise(8, 4), exif=turned(6), icc_profile=profile))
    assert image.info == {} and image.size == (8, 4)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(2, 0)
    array = {"I;16": ramp, "I;16B": ramp.astype(">u2"), "I": ramp.astype(np.int32)}[mode]
    image = read(saved(array, "PNG" if mode == "I;16" else "TIFF"))
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in (0, 1, 128, 255)] == [(x,) * 3 for x in (0, 1, 128, 255)]


def test_floating_point_pixels_are_refused_not_black():
    with pytest.raises(UnreadablePicture, match="floating point"):
        read(saved(np.full((4, 4), 0.5, np.float32), "TIFF"))


def rgba(opacity: int) -> Image.Image:
    return Image.new("RGBA", (4, 4), (200, 0, 0, opacity))


BLACK = Image.new("RGB", (4, 4))
# black or red where nobody should see it
CLEAR = {"RGBA": (rgba(0), {}), "LA": (Image.new("LA", (4, 4), (0, 0)), {}), "RGB": (BLACK, {"transparency": (0, 0, 0)}),
         "L": (BLACK.convert("L"), {"transparency": 0}), "1": (BLACK.convert("1"), {"transparency": 0}),
         "P": (BLACK.quantize(4), {"transparency": 0}), "P bytes": (BLACK.quantize(4), {"transparency": b"\x00\x00"}),
         "I;16": (Image.new("I;16", (4, 4)), {"transparency": 0})}


@pytest.mark.parametrize("kind", CLEAR)
def test_transparency_is_laid_over_the_background(kind):
    image, options = CLEAR[kind]
    data = saved(image, **options)
    assert read(data).getcolors() == [(16, (255, 255, 255))]
    assert read(data, how=Reading(background=(1, 2, 3))).getcolors() == [(16, (1, 2, 3))]
    assert alpha(data, "x").getcolors() == [(16, 0)] and mask(data, "x").getcolors() == [(16, 0)]


def test_half_transparency_is_mixed():
    assert read(saved(rgba(128))).getpixel((0, 0)) == pytest.approx((227, 127, 127), abs=1)


def test_premultiplied_colours_are_mixed_once():
    """As TIFF may have them: 100 of grey under an opacity of a half are 200."""
    image = pictures.laid_over((255,) * 3, Image.new("La", (4, 4), (100, 128)), "RGB", partial(pictures.rgb, profile=None))
    assert image.getpixel((0, 0)) == pytest.approx((227,) * 3, abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16"])
def test_what_is_opaque_has_no_alpha(mode):
    assert alpha(saved(Image.new(mode, (4, 4)), "TIFF"), "x") is None


def test_alpha_is_upright():
    image = Image.fromarray(noise(2, 4)).convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4)))
    found = np.asarray(alpha(saved(image, exif=turned(6)), "x"))
    assert (found == np.rot90(np.arange(8).reshape(2, 4), -1)).all()


@pytest.mark.parametrize("kind", ["L", "RGB", "P", "1", "RGBA", "I;16"])
def test_a_mask_is_grey_and_upright(kind):
    levels = np.array([[0, 255, 0, 255], [255, 255, 0, 0]], np.uint8)
    image = Image.fromarray(levels.astype(np.uint16) * 257) if kind == "I;16" else Image.fromarray(levels).convert(kind)
    found = mask(saved(image, "TIFF", tiffinfo={274: 6}), "x")
    assert found.mode == "L" and (np.asarray(found) == np.rot90(levels, -1)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "PA", "La", "RGBa"])
def test_every_mode_becomes_rgb(mode):
    white = {"LAB": (255, 128, 128), "La": (255, 255)}.get(mode)
    image = Image.new(mode, (8, 8), white) if white else Image.new("RGB", (8, 8), "white").convert(
        {"PA": "P", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    image = pictures.laid_over((0, 0, 0), image, "RGB", partial(pictures.rgb, profile=None))
    assert image.mode == "RGB" and min(image.getpixel((4, 4))) > 250


def test_bands_make_no_seams(monkeypatch):
    image = Image.fromarray(noise(40, 30)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((30, 40)))
    whole = read(saved(image))
    monkeypatch.setattr(pictures, "BAND", 100)
    assert read(saved(image)).tobytes() == whole.tobytes()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_an_animation_is_refused_or_its_first_frame(form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {}))
    with pytest.raises(UnreadablePicture, match="it has 3 frames or pages; data.pixels.animated: first takes the first"):
        read(data)
    assert read(data, how=Reading(first_frame=True)).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=2)


JPEG, PNG = saved(noise(200, 200), "JPEG"), saved(noise())
BROKEN = {"half a JPEG": JPEG[:20_000], "half a PNG": PNG[:6_000], "a PNG with a wrong byte": PNG[:500] + b"?" + PNG[501:],
          "nothing": b"", "a web page": b"<!DOCTYPE html><html>404</html>", "a GIF": saved(Image.new("P", (4, 4)), "GIF"),
          "a head": JPEG[:20]}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_whole_picture_is_refused(what, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)       # as some libraries do, for the whole process
    for use in (pictures.read, alpha, mask):
        with pytest.raises(UnreadablePicture, match="^a name: not a readable picture") as error:
            use(BROKEN[what], "a name")
        assert error.value.reason and "\n" not in str(error.value)


def test_the_reason_survives_the_way_from_another_process():
    error = pickle.loads(pickle.dumps(UnreadablePicture("a name", "a reason")))
    assert error.reason == "a reason" and str(error) == "a name: not a readable picture (a reason); repair or remove it"


def test_a_lack_of_memory_is_the_pictures_fault(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(pictures, "decoded", fail)
    with pytest.raises(UnreadablePicture, match="memory"):
        read(PNG)


@pytest.mark.parametrize("pillows", [None, 10, 10**9])
def test_the_limit_alone_decides_and_is_the_last_that_passes(pillows, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    for form in ("PNG", "TIFF", "WEBP"):
        data = saved(noise(), form)
        assert read(data, how=Reading(max_pixels=64 * 64)).size == (64, 64)
        with pytest.raises(UnreadablePicture, match="64 × 64 are more than 4,095 pixels"):
            read(data, how=Reading(max_pixels=64 * 64 - 1))


def test_what_takes_more_memory_than_planned_is_refused_until_the_limit_is_raised(monkeypatch):
    monkeypatch.setattr(pictures, "MEMORY", 100_000)
    data = saved(np.dstack([noise(100, 200), noise(100, 200)[:, :, :1]]))
    with pytest.raises(UnreadablePicture, match=r"200 × 100 pixels of this kind \(PNG RGBA\) take"):
        read(data)
    assert read(data, how=Reading(max_pixels=10**9)).size == (200, 100)
    with pytest.raises(UnreadablePicture, match="of this kind"):        # to turn it takes a second one
        read(saved(noise(100, 150), "JPEG", exif=turned(6)))


def test_near_duplicates_have_near_hashes():
    picture = Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 60).convert("RGB")
    same = [picture.resize((120, 80)), Image.open(io.BytesIO(saved(picture, "JPEG", quality=30)))]
    other = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.fromarray(noise())]

    def apart(image: Image.Image) -> int:
        one, two = difference_hashes([shrunk(picture), shrunk(image)])
        return int(one ^ two).bit_count()

    assert all(apart(image) <= 6 for image in same) and all(apart(image) > 16 for image in other)
    assert difference_hashes([shrunk(Image.new("RGB", (50, 50)))]) == [0]
