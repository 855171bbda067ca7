"""What networks are shown beside noisy latents: holes from their position alone, of widely different sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from finetune.data import encode
from finetune.data.beside import LEAST, MOST, random_hole
from finetune.data.index import build
from finetune.data.loader import Encoded
from finetune.data.pictures import Reading
from finetune.errors import FinetuneError
from finetune.recipe.data import Images


def test_random_holes_are_of_all_sizes():
    """Uniform between the two shares, as the law is: each tenth within four standard deviations."""
    holes = torch.stack([random_hole(48, 64, 0, position) for position in range(800)])
    assert holes.shape == (800, 1, 48, 64) and set(holes.unique().tolist()) == {0, 1}
    covered = holes.mean((1, 2, 3)).numpy()
    counts, _ = np.histogram(covered, np.linspace(LEAST, MOST, 11))
    assert covered.min() >= LEAST and covered.max() < MOST + 0.05 and (abs(counts - 80) < 4 * 80 ** 0.5).all(), counts
    somewhere = holes.mean((0, 1))
    assert 0.08 < somewhere.min() and somewhere.max() < 0.65       # no corner is left out, and the middle not always in
    assert len({hole.numpy().tobytes() for hole in holes}) == 800
    assert torch.equal(random_hole(48, 64, 0, 5), holes[5]) and not torch.equal(random_hole(48, 64, 1, 5), holes[5])


@pytest.fixture
def masks(tmp_path, pictures):
    """White in the left half, grey that counts as black in the right."""
    for picture in pictures.glob("*.png"):
        mask = Image.new("L", Image.open(picture).size, 100)
        ImageDraw.Draw(mask).rectangle([0, 0, mask.width // 2 - 1, mask.height], fill=200)
        mask.save(tmp_path / picture.name)
    return tmp_path


def test_a_share_of_the_draws_is_all_hole(pictures, streamed):
    stream = streamed(pictures, shows="random", whole=0.25)
    batch = stream.batch({position: position % 7 for position in range(300)}, 1.0)
    whole = [bool(hole.all()) for hole in batch.beside[:, :1]]
    assert 50 < sum(whole) < 100
    assert torch.equal(batch.beside[:, 1:], torch.where(batch.beside[:, :1] == 1, 0, batch.pixels))
    assert not any(streamed(pictures, shows="random").batch({p: 0}, 1.0).beside[0, :1].all() for p in range(50))


def test_cached_latents_are_shown_beside_the_very_same(pictures, streamed):
    how = dict(flip=True, shows="random", whole=0.25, mask="alpha")
    plain = streamed(pictures, **how)

    def moments(pixels):
        return torch.nn.functional.avg_pool2d(pixels, 8)[:, [0, 0]]

    latents = encode.pictures(plain.index, plain.sizes, plain.view, moments, quiet=True)
    cached = streamed(pictures, encoded=Encoded(latents, None, lambda moments, noise: moments), **how)
    one, other = (stream.batch({p: p % 7 for p in range(20)}, 1.0) for stream in (plain, cached))
    assert one.latents is None and other.pixels is None and torch.equal(one.beside, other.beside)


def test_masks_of_files_follow_their_picture(pictures, masks, streamed):
    index = build([Images(path=str(pictures))], Reading(), None, lambda line: None, True, holes=str(masks))
    plain = streamed(pictures, 32, flip=True, shows="files")
    assert index.fingerprint() != plain.index.fingerprint()
    stream = type(plain)(index, *(getattr(plain, name) for name in ("sizes", "captions", "view", "order")))
    for position in range(12):
        batch, flipped = stream.batch({position: 6}, 1.0), stream.flipped(position)
        hole = batch.beside[0, 0].flip(1) if flipped else batch.beside[0, 0]
        assert hole[:, :15].all() and not hole[:, 17:].any()
    (masks / "3.png").unlink()
    notes = build([Images(path=str(pictures))], Reading(), None, lambda line: None, True, holes=str(masks)).notes
    assert [note.text for note in notes] == [f"has no mask of its name in {masks}"]
    with pytest.raises(FinetuneError, match="data.inpaint.masks: there is no folder nowhere; it is `random` or"):
        build([Images(path=str(pictures))], Reading(), None, lambda line: None, True, holes="nowhere")


def test_conditions_follow_their_picture_whatever_becomes_of_it(pictures, streamed):
    """The pictures as their own conditions: the same piece of the same side, whether latents are cached or not."""
    def looked(folder, field="data.images", **named):
        return build([Images(path=str(folder))], Reading(), None, lambda line: None, True, field, **named)

    plain = streamed(pictures, 32, flip=True, random_crop=True, shows="condition", mask="alpha")
    index = looked(pictures, conditions=str(pictures))
    assert index.fingerprint() != plain.index.fingerprint()
    stream = replace(plain, index=index)
    batch = stream.batch({p: p % 7 for p in range(14)}, 1.0)
    assert torch.equal(batch.beside, batch.pixels / 2 + 0.5)
    encoded = Encoded(lambda number, flip: {"moments": torch.zeros(8, 4, 4), "mask": torch.ones(1, 4, 4)}, None, torch.add)
    cached = replace(stream, encoded=replace(encoded, sample=lambda moments, noise: noise))
    assert torch.equal(cached.batch({p: p % 7 for p in range(14)}, 1.0).beside, batch.beside)
    with pytest.raises(FinetuneError, match="data.condition: there is no folder nowhere; it is a folder of conditions"):
        looked(pictures, conditions="nowhere")


def test_a_small_picture_is_the_mean_of_its_pixels(pictures, streamed):
    batch = streamed(pictures, 32, shows="small", stride=4).batch({0: 0, 1: 1}, 1.0)
    assert batch.beside.shape == (2, 3, 8, 8)
    torch.testing.assert_close(batch.beside[1, 2, 3, 5], batch.pixels[1, 2, 12:16, 20:24].mean())
