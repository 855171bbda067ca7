"""One outcome for each file that a folder from anywhere may hold. `python tests/data/test_hostile.py` writes
tests/golden/hostile.json anew: look at every line that it changes."""

import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageStat

from finetune.data import pictures

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "hostile.json"
CORPUS = runpy.run_path(str(Path(__file__).with_name("hostile.py")))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")      # pytest forgets the filters set on import
LOSSY = re.compile(r"\.(jpg|webp|avif|mpo)$|^icc-")     # what a decoder's next version may round otherwise
WORST = """
import re, sys
from pathlib import Path
from finetune.data import pictures
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        pictures.read(file.read_bytes(), file.name)
    except pictures.UnreadablePicture:
        pass
# ru_maxrss would count what the parent had taken before it started this process
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def outcome(file: Path) -> dict:
    """The reason's first words, a hash of size and pixels, or where decoders round size and mean colours of the quarters."""
    try:
        image = pictures.read(file.read_bytes(), file.name)
    except pictures.UnreadablePicture as e:
        assert e.reason and "\n" not in e.reason and len(e.reason) < 250
        return {"refused": " ".join(e.reason.split()[:4])}
    assert image.mode == "RGB"
    if LOSSY.search(file.name):
        return {"size": list(image.size), "quarters": [mean for part in quarters(image) for mean in part]}
    digest = hashlib.sha256(f"{image.width} x {image.height}".encode())
    for top in range(0, image.height, 1000):
        digest.update(image.crop((0, top, image.width, min(top + 1000, image.height))).tobytes())
    return {"pixels": digest.hexdigest()[:16]}


def quarters(image: Image.Image) -> list[list[int]]:
    xs, ys = ((0, (side + 1) // 2, side // 2, side) for side in image.size)
    return [[round(mean) for mean in ImageStat.Stat(image.crop((xs[x], ys[y], xs[x + 1], ys[y + 1]))).mean]
            for y in (0, 2) for x in (0, 2)]


def pixels(file: Path) -> np.ndarray:
    return np.asarray(pictures.read(file.read_bytes(), file.name)).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("hostile")
    CORPUS["build"](made)
    return made


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[str, dict]:
    return {name: outcome(folder / name) for name in CORPUS["PICTURES"]}


@pytest.mark.parametrize("name", CORPUS["PICTURES"])
def test_a_file_has_the_outcome_it_had(name, outcomes):
    now, then = outcomes[name], json.loads(GOLDEN.read_text())["outcomes"][name]
    assert now.pop("quarters", []) == pytest.approx(then.pop("quarters", []), abs=3)
    assert now == then


def test_no_outcome_is_left_over():
    assert list(json.loads(GOLDEN.read_text())["outcomes"]) == list(CORPUS["PICTURES"]) and len(CORPUS["PICTURES"]) > 150


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_whole_folder_is_read_in_600_mebibytes_and_silence(folder):
    command = [sys.executable, "-W", "default", "-c", WORST, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "" and int(done.stdout) <= 600


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_all_eight_orientations_are_one_picture(suffix, folder):
    first, *others = [pixels(folder / f"exif-{orientation}.{suffix}") for orientation in range(1, 9)]
    assert np.abs(first - CORPUS["quarters"]()).mean() < 3
    for other in others:
        assert first.shape == other.shape and np.abs(first - other).mean() < (3 if suffix == "jpg" else 1e-9)


def test_colours_are_those_of_the_profile(folder):
    """Display P3 pixels become other numbers, by the textbook's matrices; an sRGB profile leaves the same."""
    p3, plain, srgb = (pixels(folder / name) for name in ("icc-p3.png", "mode-RGB.png", "icc-srgb.png"))
    assert (plain == srgb).all()
    linear = CORPUS["srgb_curve"](plain / 255) @ np.array(CORPUS["P3"]) @ np.linalg.inv(CORPUS["REC709"])
    linear = linear.clip(0, 1)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(p3 - expected).max() < 2 and np.abs(p3 - plain).max() > 15


@pytest.mark.parametrize("name", [
    "cmyk-adobe.jpg", "cmyk-ycck.jpg", "cmyk-plain.jpg", "cmyk.tif", "exif-junk.jpg", "exif-99.jpg", "icc-junk.png",
    "icc-cut.jpg", "icc-grey-on-rgb.png", "icc-cmyk-on-rgb.jpg", "crc-pixels.png", "png-named.jpg", "webp-named.png",
    "trailing.jpg", "long-text.png", "ycbcr.tif", "loop.tif"])
def test_the_colours_are_those_that_were_drawn(name, folder):
    assert np.abs(pixels(folder / name) - CORPUS["quarters"]()).mean() < 3


@pytest.mark.parametrize("name, channels", [
    ("sixteen-grey.tif", 1), ("sixteen-grey-big-endian.tif", 1), ("sixteen-1.png", 1), ("sixteen-RGB.tif", 3),
    ("sixteen-3.png", 3)])
def test_sixteen_bits_are_scaled(name, channels, folder):
    """To the nearest; of colours Pillow cuts the lower byte off."""
    assert np.abs(pixels(folder / name) - CORPUS["ramp"](channels) / 257).max() < (1 if channels == 3 else 0.51)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        CORPUS["build"](Path(made))
        found = {name: outcome(Path(made) / name) for name in CORPUS["PICTURES"]}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(result)}" for name, result in found.items())
    note = "written by: python tests/data/test_hostile.py"
    GOLDEN.write_text(f'{{\n "made_by": "{note}",\n "outcomes": {{\n{lines}\n }}\n}}\n')


def test_names_and_links_of_any_kind(tmp_path, monkeypatch):
    """All are found, once; what cannot be opened is named; every name can be printed, on one line and anywhere."""
    from finetune.data.index import build
    from finetune.recipe.data import Images

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    expected = CORPUS["build_names"](tmp_path)
    root = tmp_path / "names"
    for _ in range(2):          # read, and remembered
        index = build([Images(path=str(root))], pictures.Reading(), None, print, True)
        names = [index.name(i) for i in range(len(index))]
        assert all(name.isprintable() and name.encode() for name in names)
        unreadable = {note.name.rpartition("/")[2] for note in index.notes if note.kind == "unreadable"}
        root_reads = os.access(root / "forbidden.png", os.R_OK)
        assert unreadable == set(CORPUS["UNREADABLE"]) - ({"forbidden.png"} if root_reads else set())
        assert len(names) == len(expected) + root_reads
        data = (root / "plain.png").read_bytes()
        assert all(index.read(i) == data for i in range(len(index)))
    plain = {name for name in expected if name.isprintable() and name.isascii() and "\\" not in name}
    assert plain <= {os.path.relpath(name, root) for name in names}
