from collections import Counter

import pytest
import torch

from finetune.batch import Conditioning
from finetune.data import encode
from finetune.data.loader import Encoded, Loader, View
from finetune.data.scan import scan

N = 7       # pictures in the fixture
STRIDE = 8


def view(**changes) -> View:
    return View(**{"resolution": 16, "random_crop": False, "flip": False, "template": "{text}", "dropout": 0.0} | changes)


def loader(pictures, seed=0, encoded=None, **changes) -> Loader:
    return Loader(scan(str(pictures), "{text}"), view(**changes), seed, encoded)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 10])
def test_each_example_is_seen_once_in_each_epoch(pictures, batch):
    x = loader(pictures)
    seen = [x.example(p) for first in range(0, 3 * N * batch, batch) for p in range(first, first + batch)]
    for epoch in range(3 * batch):
        assert sorted(seen[epoch * N:(epoch + 1) * N]) == list(range(N))
    assert len({tuple(seen[e * N:(e + 1) * N]) for e in range(3)}) == 3      # in an order of its own
    assert set(Counter(seen).values()) == {3 * batch}


def test_a_position_is_the_same_whoever_asks_and_when(pictures):
    changes = dict(random_crop=True, flip=True, dropout=0.3)
    whole = loader(pictures, **changes).batch(list(range(20)))
    late = loader(pictures, **changes)          # another process, that begins at the end
    for p in reversed(range(20)):
        one = late.batch([p])
        assert torch.equal(one.pixels[0], whole.pixels[p]) and one.captions == [whole.captions[p]]
        assert torch.equal(one.geometry[0], whole.geometry[p])


def test_batches_have_their_shapes(pictures):
    batch = loader(pictures).batch([3, 4])
    assert batch.positions == [3, 4] and batch.pixels.shape == (2, 3, 16, 16) and batch.geometry.shape == (2, 6)
    assert batch.weight.tolist() == [1, 1] and batch.weight.dtype == torch.float32
    assert batch.latents is None and batch.conditioning is None
    assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1


def test_another_seed_is_another_stream(pictures):
    one, other = loader(pictures, 0, flip=True), loader(pictures, 1, flip=True)
    positions = range(10 * N)
    assert [one.example(p) for p in positions] != [other.example(p) for p in positions]
    assert [one.flipped(p) for p in positions] != [other.flipped(p) for p in positions]


def test_half_of_the_draws_are_mirrored_if_flips_are_wanted(pictures):
    x = loader(pictures, flip=True)
    assert 450 < sum(x.flipped(p) for p in range(1000)) < 550
    assert not any(loader(pictures).flipped(p) for p in range(100))
    upright, p = loader(pictures), next(p for p in range(100) if x.flipped(p))
    assert torch.equal(x.batch([p]).pixels, upright.batch([p]).pixels.flip(3))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_that_share_of_the_captions_is_empty(pictures, share):
    x = loader(pictures, dropout=share)
    empty = [x.caption(p) == "" for p in range(1000)]
    assert abs(sum(empty) / 1000 - share) < 0.05
    assert all(x.caption(p).startswith("a ") for p in range(1000) if not empty[p])


def test_a_dropped_caption_is_empty_of_the_template_too(pictures):
    assert set(loader(pictures, dropout=1.0, template="{text}, in ink").batch([0, 1]).captions) == {""}


def test_crops_are_central_or_spread_over_all_there_is(pictures):
    x, centre = loader(pictures, random_crop=True), loader(pictures)
    lefts = {}
    for p in range(400):
        crop, middle = x.crop(p), centre.crop(p)
        assert crop.top == 0 and crop.resolution == 16      # the pictures are wider than high
        room = round(crop.original_w * 16 / crop.original_h) - 16
        assert middle.left == round(room / 2)
        lefts.setdefault((x.example(p), room), set()).add(crop.left)
    assert all(found == set(range(room + 1)) for (_, room), found in lefts.items())


def moments(pixels) -> torch.Tensor:
    """A stand-in for a VAE: what it gives depends on every pixel and on where it is."""
    mean = torch.nn.functional.avg_pool2d(pixels, STRIDE)
    return torch.cat([mean, mean - 3], 1)


def sample(moments, noise) -> torch.Tensor:
    mean, logvar = moments.chunk(2, 1)
    return mean + (0.5 * logvar).exp() * noise


def states(captions: list[str]) -> Conditioning:
    tokens = torch.tensor([[[hash(c) % 1000, len(c)]] for c in captions], dtype=torch.float32)
    return Conditioning(tokens, tokens[:, 0] + 1)


def test_cached_and_uncached_pictures_and_captions_agree(pictures):
    from finetune.diffusion import noise

    seen = dict(flip=True, dropout=0.3, template="{text}, in ink")
    plain, examples = loader(pictures, **seen), scan(str(pictures), "{text}")
    encoded = Encoded(encode.pictures(examples, plain.view, moments, quiet=True),
                      encode.texts(examples, plain.view, states), sample)
    cached = loader(pictures, encoded=encoded, **seen)
    for positions in ([0, 1, 2], [12, 13, 14, 15], [6, 7]):      # over the end of an epoch
        one, other = cached.batch(positions), plain.batch(positions)
        assert one.pixels is None and one.captions == other.captions and torch.equal(one.geometry, other.geometry)
        drawn = noise.normal((3, 2, 2), 0, positions, "posterior")
        torch.testing.assert_close(one.latents, sample(moments(other.pixels), drawn))
        told = states(other.captions)
        assert torch.equal(one.conditioning.tokens, told.tokens) and torch.equal(one.conditioning.pooled, told.pooled)
    whole = cached.batch(list(range(8)))
    assert torch.equal(torch.cat([cached.batch([p]).latents for p in range(8)]), whole.latents)


def test_latents_are_drawn_anew_in_each_epoch(pictures):
    plain = loader(pictures)
    encoded = Encoded(encode.pictures(plain.examples, plain.view, moments, quiet=True), None, sample)
    cached = loader(pictures, encoded=encoded)
    first = {cached.example(p): cached.batch([p]).latents for p in range(N)}
    assert all(not torch.equal(cached.batch([p]).latents, first[cached.example(p)]) for p in range(N, 2 * N))
