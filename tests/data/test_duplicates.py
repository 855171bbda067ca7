"""Copies are found, and nothing else is; never by comparing all with all."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from finetune.data import duplicates
from finetune.data.duplicates import copies, crowded, links, originals, overlap
from finetune.data.index import build
from finetune.data.pictures import Reading
from finetune.errors import FinetuneError
from finetune.recipe.data import Images

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
HOW = Reading()


def indexed(*folders):
    return build([Images(path=str(folder)) for folder in folders], HOW, None, lambda line: None, True)


def scene(seed: int, side: int = 256) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(rng.integers(0, 255, 3).tolist()))
    for _ in range(6):
        x, y, r = *rng.integers(0, side, 2), rng.integers(side // 16, side // 3)
        ImageDraw.Draw(image).ellipse([x - r, y - r, x + r, y + r], fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


def groups(index) -> list[list[str]]:
    return [[Path(index.name(i)).name for i in group] for group in copies(index, HOW)]


@pytest.mark.parametrize("name", ["attributes", "layout", "style", "style_held_out", "subject", "subject_held_out",
                                  "subject_class", "texture"])
def test_no_bundled_picture_is_a_copy_of_another(name):
    assert copies(indexed(DATASETS / name), HOW) == []


def test_bundled_pictures_that_were_compressed_or_halved_are_found(tmp_path):
    missed = {"half.png": 0, "50.jpg": 0, "75.jpg": 0}
    # Not threads of one pixel, which a JPEG blurs, and not the boxes, of which nothing is learned.
    files = sorted(file for file in DATASETS.glob("*/*.png")
                   if file.parent.name.partition("_")[0] not in ("texture", "layout"))
    for n, file in enumerate(files):
        picture = Image.open(file).convert("RGB")
        for what in missed:
            changed = picture.resize((32, 32)) if what == "half.png" else picture
            changed.save(tmp_path / f"{n:03} {what}", quality=int(what[:2]) if what.endswith("jpg") else None)
        picture.save(tmp_path / f"{n:03}.png")
    index = indexed(tmp_path)
    first, names = originals(index, HOW), [Path(index.name(i)).name for i in range(len(index))]
    for i, name in enumerate(names):
        assert names[first[i]][:3] == name[:3], f"{name} is no copy of {names[first[i]]}"
    for n in range(len(files)):
        own = first[names.index(f"{n:03}.png")]
        for what in missed:
            missed[what] += first[names.index(f"{n:03} {what}")] != own
    # 64 px are few: the hashes of some hatched drawings leave the six bits
    few = len(files) / 20
    assert missed["75.jpg"] == 0 and missed["50.jpg"] <= few and missed["half.png"] <= few, missed


def test_groups_hold_all_kinds_of_copies(tmp_path):
    for n in range(8):
        scene(n).save(tmp_path / f"{n}.png")
    (tmp_path / "again.png").write_bytes((tmp_path / "3.png").read_bytes())
    scene(5).save(tmp_path / "small.jpg", quality=50)
    scene(5).resize((128, 128)).save(tmp_path / "smaller.webp", quality=80)
    scene(0).resize((1000, 1000)).save(tmp_path / "big.png")
    assert groups(indexed(tmp_path)) == [["0.png", "big.png"], ["3.png", "again.png"],
                                         ["5.png", "small.jpg", "smaller.webp"]]


def test_copies_of_usual_sizes_are_all_found(tmp_path):
    for n in range(30):
        scene(n, 400).save(tmp_path / f"{n:02}.png")
        scene(n, 400).save(tmp_path / f"{n:02} 50.jpg", quality=50)
        scene(n, 400).resize((200, 200)).save(tmp_path / f"{n:02} half 75.jpg", quality=75)
    assert [len({name[:2] for name in group}) for group in groups(indexed(tmp_path))] == [1] * 30
    assert {len(group) for group in groups(indexed(tmp_path))} == {3}


def test_another_colour_is_another_picture(tmp_path):
    """Flat drawings whose hashes are equal: of the whole, and of something small."""
    for n, colour in enumerate(["red", "orange", "green", "blue", "navy"]):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"plain {n}.png")
        image = scene(1)
        ImageDraw.Draw(image).ellipse([100, 100, 124, 124], fill=colour)
        image.save(tmp_path / f"spot {n}.png")
    index = indexed(tmp_path)
    assert len(set(index.phash[:5].tolist())) == 1 and copies(index, HOW) == []


def test_overlap_names_both(tmp_path):
    for folder, seeds in (("train", [0, 1, 2]), ("held", [2, 3, 1])):
        (tmp_path / folder).mkdir()
        for n, seed in enumerate(seeds):
            scene(seed).save(tmp_path / folder / f"{n}.jpg", quality=60 if folder == "held" else 90)
    assert overlap(indexed(tmp_path / "train"), indexed(tmp_path / "held"), HOW) == [(2, 0), (1, 2)]


def test_every_near_hash_is_looked_at():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2 ** 64, 40_000, dtype=np.uint64)
    for bits in (0, 3, 6):
        near = hashes.copy()
        near[20_000:21_000] = hashes[:1000]
        for row in range(1000):
            for bit in rng.choice(64, bits, replace=False):
                near[20_000 + row] ^= np.uint64(1) << np.uint64(bit)
        found = crowded(near)
        assert found[:1000].all() and found[20_000:21_000].all()
        assert found[1000:20_000].sum() < 5


def test_a_million_hashes_take_seconds():
    rng = np.random.default_rng(0)
    begun = time.perf_counter()
    crowded(rng.integers(0, 2 ** 64, 1_000_000, dtype=np.uint64))
    assert time.perf_counter() - begun < 20      # 2.5 here


def joined(thumbs: np.ndarray) -> int:
    """How many groups of thumbnails there are."""
    root = np.arange(len(thumbs))
    for a, b in links(thumbs):
        a, b = sorted((duplicates._root(root, a), duplicates._root(root, b)))
        root[b] = a
    return sum(root[n] == n for n in range(len(root)))


def test_thousands_of_flat_pictures_do_not_meet_each_other():
    rng = np.random.default_rng(0)
    levels = np.stack(np.meshgrid(*[np.arange(5, 256, 25)] * 3), -1).reshape(-1, 3)[:1000].astype(np.uint8)
    plain = rng.permutation(np.repeat(levels, 5, 0))[:, None, None] * np.ones((1, 16, 16, 1), np.uint8)
    begun = time.perf_counter()
    assert joined(plain) == 1000
    assert joined(plain[:1].repeat(5000, 0)) == 1
    assert time.perf_counter() - begun < 20      # 0.6 here


def test_cells_find_the_pairs_that_all_with_all_finds():
    rng = np.random.default_rng(1)
    thumbs = rng.integers(0, 255, (600, 4, 4, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    thumbs[300:] = np.clip(thumbs[:300].astype(int) + rng.normal(0, 7, thumbs[:300].shape), 0, 255)
    apart = ((thumbs[:, None].astype(np.float32) - thumbs[None]) ** 2).mean(-1)
    near = (apart.mean((2, 3)) <= duplicates.NEAR ** 2) & (apart.max((2, 3)) <= duplicates.SPOT ** 2)
    assert near[np.arange(300), np.arange(300, 600)].mean() > 0.9
    assert {tuple(sorted(map(int, pair))) for pair in links(thumbs)} == {*map(tuple, np.argwhere(np.triu(near, 1)).tolist())}


def test_an_edited_picture_is_told(tmp_path):
    for n in range(3):
        scene(0).save(tmp_path / f"{n}.jpg", quality=60 + 10 * n)
    index = indexed(tmp_path)
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(FinetuneError, match="1.jpg: has changed since"):
        copies(index, HOW)
