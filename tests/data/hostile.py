"""Files that a folder of pictures from anywhere may hold. `python tests/data/hostile.py FOLDER` builds them there.

All are made here, the same each time but for what an encoder's version changes and the date in an AVIF sequence."""

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTED = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
            6: np.rot90, 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1)}    # how it is stored
D50 = (0.9642, 1.0, 0.8249)
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
REC709 = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def quarters(width=32, height=16) -> np.ndarray:
    """Four corners that differ."""
    array = np.full((height, width, 3), 230, np.uint8)
    array[:height // 2, :width // 2], array[:height // 2, width // 2:] = (200, 40, 30), (30, 180, 60)
    array[height // 2:, :width // 2] = (40, 50, 190)
    return array


def speckles(size=64, channels=3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, channels), np.uint8)


def saved(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)


def png(width: int, height: int, depth: int, colour: int, packed: bytes, *before: bytes, after=(), interlaced=0) -> bytes:
    """A PNG around compressed pixels, with chunks before and after them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", packed), *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def rows(array: np.ndarray) -> bytes:
    """A PNG's pixels, unfiltered."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))


def black(width: int, height: int, depth=1, colour=0) -> bytes:
    """A PNG of few bytes for very many pixels."""
    bits = depth * {0: 1, 2: 3, 6: 4}[colour]
    packer, row = zlib.compressobj(1), bytes(1 + (width * bits + 7) // 8)
    return png(width, height, depth, colour, b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()]))


def with_chunks(*before: bytes, after=()) -> bytes:
    return png(32, 16, 8, 2, rows(quarters()), *before, after=after)


def bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([packer.compress(bytes(2**20)) for _ in range(megabytes)] + [packer.flush()])


def interlaced() -> bytes:
    array = speckles(16)
    passes = [array[y::dy, x::dx] for y, x, dy, dx in ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2),
                                                       (0, 1, 2, 2), (1, 0, 2, 1))]
    return png(16, 16, 8, 2, zlib.compress(b"".join(b"\0" + row.tobytes() for p in passes for row in p)), interlaced=1)


def ramp(channels: int) -> np.ndarray:
    """(2, 64, C) big-endian 16-bit numbers from 0 to 65535."""
    line = np.linspace(0, 65535, 64).round().astype(">u2")
    return np.stack([np.roll(line, 9 * c) for c in range(channels)], -1)[None].repeat(2, 0).astype(">u2")


def tiff(array: np.ndarray, photometric: int, bits: tuple[int, ...], *tags: tuple[int, int, int], order="<",
         loop=False) -> bytes:
    """A TIFF of one raw strip; tags are (number, type 3 or 4, value)."""
    pixels, big = array.astype(array.dtype.newbyteorder(order)).tobytes(), 8 + array.nbytes
    entries = [(256, 4, array.shape[1]), (257, 4, array.shape[0]), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
               (277, 3, len(bits)), (278, 4, array.shape[0]), (279, 4, array.nbytes), *tags]
    fields = {number: struct.pack(order + ("HHIHH" if kind == 3 else "HHII"), number, kind, 1, *[value, 0][:5 - kind])
              for number, kind, value in entries}
    inline = struct.pack(order + "4H", *(bits + (0,) * 4)[:4])[:4] if len(bits) < 3 else struct.pack(order + "I", big)
    fields[258] = struct.pack(order + "HHI", 258, 3, len(bits)) + inline
    start = big + 2 * len(bits)
    table = struct.pack(order + "H", len(fields)) + b"".join(fields[n] for n in sorted(fields))
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start) + pixels \
        + struct.pack(order + f"{len(bits)}H", *bits) + table + struct.pack(order + "I", start if loop else 0)


def profile(space: bytes, tags: dict[bytes, bytes], kind=b"mntr", connection=b"XYZ ") -> bytes:
    """An ICC profile, version 2."""
    body, table, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02100000, kind, space, connection) + bytes(12) + b"acsp"
    header = (header + bytes(28)).ljust(68, b"\0") + b"".join(struct.pack(">i", round(v * 65536)) for v in D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def curve(f: Callable[[np.ndarray], np.ndarray]) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + (f(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2").tobytes()


def rgb_profile(primaries, f) -> bytes:
    colours = {name + b"XYZ": xyz(values) for name, values in zip((b"r", b"g", b"b"), primaries)}
    return profile(b"RGB ", {b"wtpt": xyz(D50), **colours, **{name + b"TRC": curve(f) for name in (b"r", b"g", b"b")}})


def srgb_curve(x: np.ndarray) -> np.ndarray:
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def grey_profile() -> bytes:
    return profile(b"GRAY", {b"wtpt": xyz(D50), b"kTRC": curve(lambda x: x)})


def cmyk_profile() -> bytes:
    """Inks of a press that is not Pillow's: a table of two steps an ink."""
    lab = [(255 * (1 - k) * (1 - 0.3 * c - 0.5 * m - 0.1 * y), 128 + 60 * (m - c) * (1 - k),
            128 + 60 * (y - c / 2 - m / 2) * (1 - k))
           for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    identity = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *[65536 * (i % 4 == 0) for i in range(9)]) \
        + identity * 4 + bytes(round(v) for entry in lab for v in entry) + identity * 3
    return profile(b"CMYK", {b"wtpt": xyz(D50), b"A2B0": table}, b"prtr", b"Lab ")


def cmyk(transform=0, adobe=True, **options) -> bytes:
    """A JPEG of four inks as Adobe writes it (inverted; 2: as YCCK), or without Adobe's marker and not inverted."""
    image = Image.fromarray(quarters()).convert("CMYK")
    if transform:
        ycc = Image.merge("RGB", image.split()[:3]).convert("YCbCr").point(lambda v: 255 - v)
        image = Image.merge("CMYK", (*ycc.split(), image.getchannel("K")))
    data = saved(image if adobe else image.point(lambda v: 255 - v), "JPEG", quality=95, subsampling=0, **options)
    start = data.index(b"\xff\xee")
    return data[:start] + (data[start:start + 15] + bytes([transform]) if adobe else b"") + data[start + 16:]


def with_app1(content: bytes) -> bytes:
    data = saved(quarters(), "JPEG", quality=95, subsampling=0)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


def faked_size(width: int, height: int) -> bytes:
    """A JPEG that says so, of a few hundred bytes."""
    data = bytearray(saved(quarters(), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start:start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_rle() -> bytes:
    pixels = b"".join(bytes([8, line, 0, 0]) for line in range(8)) + b"\0\1"
    palette = b"".join(bytes([i, 255 - i, 7, 0]) for i in range(256))
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(pixels), 0, 0, 54 + 1024) \
        + struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(pixels), 0, 0, 256, 0) + palette + pixels


def animation(form: str, **options) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    return saved(frames[0], form, save_all=True, append_images=frames[1:], **options)


def half_clear(mode: str) -> Image.Image:
    """Opaque at the left, clear at the right, in between neither."""
    image = Image.fromarray(quarters()).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image.convert(mode)


def palette_image() -> Image.Image:
    return Image.fromarray(quarters()).quantize(4)


def cut(data: bytes, parts: int, name: str) -> dict[str, Callable[[], bytes]]:
    """The file's beginning, from some bytes to nearly all."""
    return {name.format(i): lambda i=i: data[:16 + (len(data) - 64) * i // parts] for i in range(parts)}


LOSSY = {"quality": 95, "subsampling": 0}
WHOLE = {"png": lambda: saved(speckles(), "PNG"), "webp": lambda: saved(speckles(), "WEBP", lossless=True),
         "tif": lambda: saved(speckles(), "TIFF", compression="tiff_lzw"), "bmp": lambda: saved(speckles(), "BMP"),
         "avif": lambda: saved(speckles(), "AVIF", speed=10)}
OPTIONS = {"jpg": ("JPEG", LOSSY), "png": ("PNG", {}), "webp": ("WEBP", {"lossless": True}), "tif": ("TIFF", {})}
CROSS = b"<x:xmpmeta><rdf:Description tiff:Orientation=\"6\"/></x:xmpmeta>"

PICTURES: dict[str, Callable[[], bytes]] = {
    **{f"exif-{o}.{suffix}": lambda o=o, form=form, options=options:
       saved(np.ascontiguousarray(ORIENTED[o](quarters())), form, exif=exif(o), **options)
       for suffix, (form, options) in OPTIONS.items() for o in ORIENTED},
    "exif-99.jpg": lambda: saved(quarters(), "JPEG", exif=exif(99), **LOSSY),
    "exif-junk.jpg": lambda: with_app1(b"Exif\0\0" + bytes(range(200))),
    "exif-cut.jpg": lambda: with_app1(b"Exif\0\0MM\0*\0\0\0\x08\0\x40\x01\x12\0\x03\0\0"),
    "exif-empty.jpg": lambda: with_app1(b"Exif\0\0"),
    "exif-junk.png": lambda: with_chunks(chunk(b"eXIf", b"junk")),
    "exif-late.png": lambda: with_chunks(after=[chunk(b"eXIf", exif(6).tobytes()[6:])]),
    "exif-xmp.png": lambda: with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + CROSS)),
    "cmyk-adobe.jpg": cmyk,
    "cmyk-ycck.jpg": lambda: cmyk(2),
    "cmyk-plain.jpg": lambda: cmyk(adobe=False),
    "cmyk.tif": lambda: saved(Image.fromarray(quarters()).convert("CMYK"), "TIFF"),
    "icc-cmyk.jpg": lambda: cmyk(icc_profile=cmyk_profile()),
    "icc-p3.jpg": lambda: saved(quarters(), "JPEG", icc_profile=rgb_profile(P3, srgb_curve), **LOSSY),
    "icc-p3.png": lambda: saved(quarters(), "PNG", icc_profile=rgb_profile(P3, srgb_curve)),
    "icc-p3-alpha.png": lambda: saved(half_clear("RGBA"), "PNG", icc_profile=rgb_profile(P3, srgb_curve)),
    "icc-p3-palette.png": lambda: saved(palette_image(), "PNG", icc_profile=rgb_profile(P3, srgb_curve)),
    "icc-p3.webp": lambda: saved(quarters(), "WEBP", lossless=True, icc_profile=rgb_profile(P3, srgb_curve)),
    "icc-p3.avif": lambda: saved(quarters(), "AVIF", subsampling="4:4:4", icc_profile=rgb_profile(P3, srgb_curve)),
    "icc-adobe.tif": lambda: saved(quarters(), "TIFF", icc_profile=rgb_profile(ADOBE, lambda x: x ** 2.2)),
    "icc-srgb.png": lambda: saved(quarters(), "PNG", icc_profile=rgb_profile(REC709, srgb_curve)),
    "icc-grey.png": lambda: saved(Image.fromarray(quarters()).convert("L"), "PNG", icc_profile=grey_profile()),
    "icc-grey-alpha.png": lambda: saved(half_clear("LA"), "PNG", icc_profile=grey_profile()),
    "icc-grey-on-rgb.png": lambda: saved(quarters(), "PNG", icc_profile=grey_profile()),
    "icc-cmyk-on-rgb.jpg": lambda: saved(quarters(), "JPEG", icc_profile=cmyk_profile(), **LOSSY),
    "icc-junk.png": lambda: saved(quarters(), "PNG", icc_profile=b"no profile at all"),
    "icc-cut.jpg": lambda: saved(quarters(), "JPEG", icc_profile=rgb_profile(P3, srgb_curve)[:300], **LOSSY),
    "icc-lab.tif": lambda: tiff(np.tile(np.array([[200, 40, 226], [120, 0, 0]], np.uint8), (4, 4, 1)), 8, (8, 8, 8)),
    "icc-bomb.png": lambda: with_chunks(chunk(b"iCCP", b"x\0\0" + bomb(100))),
    **{f"mode-{mode}.png": lambda mode=mode: saved(Image.fromarray(quarters()).convert(mode), "PNG")
       for mode in ("1", "L", "RGB")},
    "mode-P.png": lambda: saved(palette_image(), "PNG"),
    **{f"mode-{mode}.png": lambda mode=mode: saved(half_clear(mode), "PNG") for mode in ("LA", "RGBA")},
    "key-P-index.png": lambda: saved(palette_image(), "PNG", transparency=1),
    "key-P-bytes.png": lambda: saved(palette_image(), "PNG", transparency=b"\x00\x80\xff"),
    "key-RGB.png": lambda: saved(quarters(), "PNG", transparency=(200, 40, 30)),
    "key-L.png": lambda: saved(Image.fromarray(quarters()).convert("L"), "PNG", transparency=230),
    "key-1.png": lambda: saved(Image.fromarray(quarters()).convert("1"), "PNG", transparency=0),
    "key-2-bit.png": lambda: png(4, 1, 2, 0, zlib.compress(b"\0\x1b"), chunk(b"tRNS", b"\0\1")),
    "key-4-bit.png": lambda: png(4, 1, 4, 0, zlib.compress(b"\0\x01\x23"), chunk(b"tRNS", b"\0\1")),
    "key-16-grey.png": lambda: png(64, 2, 16, 0, rows(ramp(1)), chunk(b"tRNS", b"\0\0")),
    "key-16-RGB.png": lambda: png(64, 2, 16, 2, rows(ramp(3)), chunk(b"tRNS", ramp(3)[0, 5].tobytes())),
    **{f"sixteen-{n}.png": lambda n=n, colour=colour: png(64, 2, 16, colour, rows(ramp(n))) for n, colour in
       ((1, 0), (2, 4), (3, 2), (4, 6))},
    "sixteen-grey.tif": lambda: tiff(ramp(1), 1, (16,)),
    "sixteen-grey-big-endian.tif": lambda: tiff(ramp(1), 1, (16,), order=">"),
    "sixteen-RGB.tif": lambda: tiff(ramp(3), 2, (16,) * 3),
    "sixteen-RGBA.tif": lambda: tiff(ramp(4), 2, (16,) * 4, (338, 3, 2)),
    "sixteen-CMYK.tif": lambda: tiff(ramp(4), 5, (16,) * 4),
    "sixteen-signed.tif": lambda: tiff(ramp(1).astype(np.int32) // 2, 1, (32,), (339, 3, 2)),
    "sixteen-negative.tif": lambda: tiff(ramp(1).astype(np.int32) - 9, 1, (32,), (339, 3, 2)),
    "sixteen-white-is-zero.tif": lambda: tiff(ramp(1), 0, (16,)),
    "twelve.tif": lambda: tiff(np.zeros((2, 96), np.uint8), 1, (12,), (256, 4, 64)),
    "thirty-two.tif": lambda: tiff(ramp(1).astype(np.uint32) * 65536, 1, (32,)),
    "float.tif": lambda: saved(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
    "premultiplied.tif": lambda: tiff(np.tile(np.uint8([[100, 20, 10, 128], [0] * 4]), (2, 2, 1)), 2, (8,) * 4, (338, 3, 1)),
    "premultiplied-grey.tif": lambda: tiff(np.tile(np.uint8([[100, 128], [0, 0]]), (2, 2, 1)), 1, (8, 8), (338, 3, 1)),
    "ycbcr.tif": lambda: saved(Image.fromarray(quarters()).convert("YCbCr"), "TIFF"),
    "palette-alpha.tif": lambda: saved(palette_image().convert("PA"), "TIFF"),
    "fax.tif": lambda: saved(Image.fromarray(quarters()).convert("1"), "TIFF", compression="group4"),
    "deflate.tif": lambda: saved(speckles(), "TIFF", compression="tiff_adobe_deflate"),
    "loop.tif": lambda: tiff(quarters(), 2, (8, 8, 8), loop=True),
    "wide.tif": lambda: tiff(quarters(), 2, (8, 8, 8), (256, 4, 2**31)),
    "pages.tif": lambda: animation("TIFF"),
    "frames.gif": lambda: animation("GIF"),
    "frames.png": lambda: animation("PNG"),
    "frames.webp": lambda: animation("WEBP"),
    "frames.avif": lambda: animation("AVIF", speed=10),
    "frames-one.png": lambda: saved(Image.new("RGB", (16, 16), "red"), "PNG", save_all=True),
    "pictures.mpo": lambda: animation("MPO", quality=95),
    **cut(saved(speckles(), "JPEG"), 20, "cut-{:02}.jpg"),
    **cut(saved(speckles(), "JPEG", progressive=True), 4, "cut-progressive-{}.jpg"),
    **{name: make for suffix, whole in WHOLE.items() for name, make in cut(whole(), 4, f"cut-{{}}.{suffix}").items()},
    **{f"whole.{suffix}": whole for suffix, whole in WHOLE.items()},
    "no-IEND.png": lambda: saved(speckles(), "PNG")[:-12],
    "crc-head.png": lambda: saved(quarters(), "PNG").replace(b"IHDR", b"IHDR\0", 1),
    "crc-text.png": lambda: with_chunks(chunk(b"tEXt", b"a\0b", crc=0)),
    "crc-pixels.png": lambda: saved(quarters(), "PNG")[:-16] + bytes(4) + saved(quarters(), "PNG")[-12:],
    "wrong-byte.png": lambda: (lambda data: data[:500] + bytes([data[500] ^ 255]) + data[501:])(saved(speckles(), "PNG")),
    "no-palette.png": lambda: png(32, 16, 8, 3, rows(quarters()[:, :, 0])),
    "no-pixels.png": lambda: with_chunks()[:33] + chunk(b"IEND", b""),
    "no-width.png": lambda: png(0, 16, 8, 2, zlib.compress(bytes(16))),
    "interlaced.png": interlaced,
    "progressive.jpg": lambda: saved(quarters(), "JPEG", progressive=True, **LOSSY),
    "grey.jpg": lambda: saved(Image.fromarray(quarters()).convert("L"), "JPEG", quality=95),
    "trailing.jpg": lambda: saved(quarters(), "JPEG", **LOSSY) + bytes(1000),
    "leading.jpg": lambda: b"\n" + saved(quarters(), "JPEG"),
    "lossy.webp": lambda: saved(quarters(), "WEBP", quality=95),
    "lossy-alpha.webp": lambda: saved(half_clear("RGBA"), "WEBP", quality=95),
    "alpha.avif": lambda: saved(half_clear("RGBA"), "AVIF", subsampling="4:4:4", quality=95),
    **{f"mode-{mode}.bmp": lambda mode=mode: saved(Image.fromarray(quarters()).convert(mode), "BMP")
       for mode in ("1", "L", "RGB", "RGBA")},
    "mode-P.bmp": lambda: saved(palette_image(), "BMP"),
    "rle.bmp": bmp_rle,
    "169-megapixels.png": lambda: black(13_000, 13_000),
    "400-megapixels.png": lambda: black(20_000, 20_000),
    "100-megapixels.png": lambda: black(10_000, 10_000),
    "90-megapixels-of-16-bits.png": lambda: black(10_000, 9_000, 16),
    "67-megapixels-with-alpha.png": lambda: black(10_000, 6_700, 8, 6),
    "4-gigapixels.jpg": lambda: faked_size(65_500, 65_500),
    "2-gigapixels.png": lambda: png(2**31 - 1, 1, 8, 0, zlib.compress(bytes(9))),
    "much-memory.png": lambda: png(10_000, 10_000, 16, 6, zlib.compress(bytes(9))),
    "text-bomb.png": lambda: with_chunks(chunk(b"zTXt", b"a\0\0" + bomb(100))),
    "text-bomb-late.png": lambda: with_chunks(after=[chunk(b"iTXt", b"a\0\1\0\0\0" + bomb(100))]),
    "text-bombs.png": lambda: with_chunks(*[chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(2**20))) for i in range(60)]),
    "long-text.png": lambda: with_chunks(chunk(b"tEXt", b"workflow\0" + b"x" * 2**21)),
    "1x1.png": lambda: saved(np.full((1, 1, 3), 77, np.uint8), "PNG"),
    "1x1.jpg": lambda: saved(np.full((1, 1, 3), 77, np.uint8), "JPEG", quality=95),
    "wide.jpg": lambda: saved(np.full((1, 65_500, 3), 77, np.uint8), "JPEG", quality=95),
    "png-named.jpg": lambda: saved(quarters(), "PNG"),
    "webp-named.png": lambda: saved(quarters(), "WEBP", lossless=True),
    "nothing.png": lambda: b"",
    "one-byte.png": lambda: b"\x89",
    "zeros.png": lambda: bytes(5000),
    "page.jpg": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "drawing.png": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "document.tif": lambda: b"%PDF-1.7\n",
    "phone.jpg": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "jpeg2000.jpg": lambda: saved(quarters(), "JPEG2000"),
    "icon.png": lambda: saved(quarters(), "ICO", sizes=[(16, 16)]),
    "pixmap.bmp": lambda: saved(quarters(), "PPM"),
}

FOUND = ["plain.png", "caf\u00e9.png", "cafe\u0301 2.png", "\U0001f436 \u6f22\u5b57.png",
         "\u0634\u062c\u0631\u0629 \u202e.png", "quote ' \" `.png",
         "new\nline.png", "a" * 251 + ".png", "-rf.png", "%s {text} $HOME.png", "UPPER.PNG", "two.dots.png",
         "back\\slash.png", os.fsdecode(b"not-utf-8-\xff\xfe.png"), "below/deeper/plain.png", "link.png"]
UNREADABLE = ["dangling.png", "loop.png", "forbidden.png"]      # the last only for who is not root
IGNORED = [".hidden.png", ".hidden/plain.png", "folder.png/", "circle/"]


def build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        (folder / name).write_bytes(make())


def build_names(folder: Path) -> list[str]:
    """Pictures of all kinds of names, and links, below `names/`: FOUND, UNREADABLE and IGNORED. Returns those of FOUND that
    this file system takes."""
    root, data, found = folder / "names", saved(quarters(), "PNG"), []
    for name in [*FOUND[:-1], ".hidden.png", ".hidden/plain.png", "forbidden.png"]:
        try:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        except OSError:
            continue
        found += [name] * (name in FOUND)
    (root / "forbidden.png").chmod(0)
    (root / "folder.png").mkdir(exist_ok=True)
    links = {"link.png": "plain.png", "dangling.png": "nowhere.png", "loop.png": "loop.png", "circle": "."}
    for name, target in links.items():
        if not (root / name).is_symlink():
            (root / name).symlink_to(target)
    return [*found, "link.png"]


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    build_names(Path(sys.argv[1]))
