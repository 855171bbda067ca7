from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.batch import Conditioning
from finetune.data import encode
from finetune.data.loader import Encoded, Loader
from finetune.diffusion import noise
from finetune.errors import FinetuneError

N = 7       # pictures in the fixture
STRIDE = 8


def whole(stream, step=0):
    """The batch of all that a step sees."""
    return stream.batch(stream.positions(step, range(stream.order.size)), 1.0)


def test_a_position_is_the_same_whoever_asks_and_when(pictures, streamed):
    changes = dict(random_crop=True, flip=True, dropout=0.3)
    early = [whole(streamed(pictures, **changes), step) for step in range(6)]
    stream = streamed(pictures, **changes)          # another process, that begins at the end
    for step in reversed(range(6)):
        for slot, (position, example) in enumerate(stream.positions(step, range(4)).items()):
            one = stream.batch({position: example}, 1.0)
            assert torch.equal(one.pixels[0], early[step].pixels[slot]) and one.captions == [early[step].captions[slot]]
            assert torch.equal(one.geometry[0], early[step].geometry[slot])


def test_batches_have_their_shapes(pictures, streamed):
    stream = streamed(pictures)
    batch = stream.batch(stream.positions(1, range(1, 3)), 0.5)
    assert batch.positions == [5, 6] and batch.pixels.shape == (2, 3, 16, 16) and batch.geometry.shape == (2, 6)
    assert batch.weight.tolist() == [1, 1] and batch.weight.dtype == torch.float32 and batch.share == 0.5
    assert batch.latents is None and batch.conditioning is None and batch.mask is None
    assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1


SPLITS = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("batch_size,accumulation,processes", SPLITS)
def test_any_split_and_any_number_of_workers_sees_the_same(pictures, streamed, batch_size, accumulation, processes, workers):
    """Of two streams in several buckets, whose steps are often smaller; and the shares make the same mean."""
    streams = [streamed(pictures, 32, step=8, random_crop=True, flip=True, dropout=0.3, shows="random", whole=0.25),
               streamed(pictures, 32, template="a circle", weight=0.5, first=2 ** 62)]
    expected = {}
    for step in range(5):
        for stream in streams:
            count = len(stream.order.examples(step))
            for position, example in stream.positions(step, range(4)).items():
                one = stream.batch({position: example}, 0.0)
                expected[position] = (one.captions[0], one.pixels[0], one.geometry[0].tolist(), stream.weight / count,
                                      one.pixels[0] if one.beside is None else one.beside[0])
    found = {}
    for process in range(processes):
        loader = Loader(streams, batch_size, accumulation, process, processes, workers)
        for batches in loader.run(range(5)):
            assert batches
            for batch in batches:
                assert len(batch.positions) <= batch_size
                for i, position in enumerate(batch.positions):
                    if batch.share:
                        assert position not in found
                        weight = batch.weight[i].item() * batch.share / processes
                        beside = batch.pixels[i] if batch.beside is None else batch.beside[i]
                        found[position] = (batch.captions[i], batch.pixels[i], batch.geometry[i].tolist(), weight, beside)
    assert found.keys() == expected.keys()
    for position, (caption, pixels, geometry, weight, beside) in found.items():
        wanted = expected[position]
        assert caption == wanted[0] and torch.equal(pixels, wanted[1]) and geometry == wanted[2]
        assert weight == pytest.approx(wanted[3]) and torch.equal(beside, wanted[4])


def test_five_buckets_batch_four_three_epochs(tmp_path, streamed):
    """Every picture exactly its repeats in each epoch, and every batch of one size."""
    for i in range(23):
        size = [(64, 64), (80, 48), (48, 80), (128, 32), (32, 128)][i % 5]
        Image.new("RGB", size, (i * 9, 0, 0)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text("x")
    stream = streamed(tmp_path, 64, step=16, repeats=3)
    loader = Loader([stream], 4, 1, 0, 1, 2)
    assert len(np.unique(stream.sizes, axis=0)) == 5
    seen = [Counter() for _ in range(3)]
    for step, batches in enumerate(loader.run(range(3 * stream.order.steps))):
        assert sum(batch.share * len(batch.positions) for batch in batches) == pytest.approx(1)
        seen[step // stream.order.steps].update(stream.positions(step, range(4)).values())
    assert all(epoch == dict.fromkeys(range(23), 3) for epoch in seen)


def test_a_reader_that_fails_is_told_and_ends(pictures, streamed, tmp_path):
    import shutil

    shutil.copytree(pictures, tmp_path / "x")
    stream = streamed(tmp_path / "x")
    (tmp_path / "x" / "3.png").unlink()
    with pytest.raises(FinetuneError, match="3.png"):
        list(Loader([stream], 4, 1, 0, 1, 2).run(range(4)))


def test_another_seed_is_another_stream(pictures, streamed):
    one, other = streamed(pictures, seed=0, flip=True), streamed(pictures, seed=1, flip=True)
    assert [one.order.examples(s).tolist() for s in range(20)] != [other.order.examples(s).tolist() for s in range(20)]
    assert [one.flipped(p) for p in range(70)] != [other.flipped(p) for p in range(70)]


def test_half_of_the_draws_are_mirrored_if_flips_are_wanted(pictures, streamed):
    x, upright = streamed(pictures, flip=True), streamed(pictures)
    assert 450 < sum(x.flipped(p) for p in range(1000)) < 550
    assert not any(upright.flipped(p) for p in range(100))
    p = next(p for p in range(100) if x.flipped(p))
    assert torch.equal(x.batch({p: 3}, 1.0).pixels, upright.batch({p: 3}, 1.0).pixels.flip(3))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_that_share_of_the_captions_is_empty(pictures, streamed, share):
    x = streamed(pictures, dropout=share)
    empty = [x.caption(0, p) == "" for p in range(1000)]
    assert abs(sum(empty) / 1000 - share) < 0.05
    assert all(x.caption(0, p).startswith("a ") for p in range(1000) if not empty[p])


def test_crops_are_central_or_spread_over_all_there_is(pictures, streamed):
    x, centre = streamed(pictures, random_crop=True), streamed(pictures)
    for example in range(N):
        middle = centre.crop(example, 0)
        room = middle.scaled[0] - 16
        assert middle.top == 0 and middle.left == round(room / 2)       # the pictures are wider than high
        assert {x.crop(example, p).left for p in range(200)} == set(range(room + 1))


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


def encoded(stream, text=True) -> Encoded:
    latents = encode.pictures(stream.index, stream.sizes, stream.view, moments, quiet=True)
    told = encode.texts([(stream.index, stream.captions)], states, lambda caption: "") if text else None
    return Encoded(latents, told, sample)


def test_cached_and_uncached_pictures_and_captions_agree(pictures, streamed):
    seen = dict(flip=True, dropout=0.3, template="{text}, in ink", step=8)
    plain = streamed(pictures, 32, **seen)
    cached = streamed(pictures, 32, encoded=encoded(plain), **seen)
    for step in range(5):
        one, other = whole(cached, step), whole(plain, step)
        assert one.pixels is None and one.captions == other.captions and torch.equal(one.geometry, other.geometry)
        mean = moments(other.pixels)
        drawn = noise.normal(mean.shape[1:], 0, one.positions, "posterior")[:, :3]
        torch.testing.assert_close(one.latents, sample(mean, drawn))
        told = states(other.captions)
        assert torch.equal(one.conditioning.tokens, told.tokens) and torch.equal(one.conditioning.pooled, told.pooled)


def test_latents_are_drawn_anew_in_each_epoch(pictures, streamed):
    plain = streamed(pictures)
    cached = streamed(pictures, encoded=encoded(plain, text=False))
    first, second = (cached.batch({position: 3}, 1.0).latents for position in (0, 7))
    assert not torch.equal(first, second)


def masked(tmp_path):
    """A picture whose left half counts, and its masks in a folder; one of them also as its own transparency."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "x").mkdir()
    picture = Image.new("RGB", (32, 32), "red")
    left = Image.new("L", (32, 32), 0)
    left.paste(255, (0, 0, 16, 32))
    left.save(tmp_path / "masks" / "0.png")
    picture.putalpha(left)
    picture.save(tmp_path / "x" / "0.png")
    (tmp_path / "x" / "0.txt").write_text("a red half")
    return tmp_path / "x", tmp_path / "masks"


@pytest.mark.parametrize("kind", ["files", "alpha"])
@pytest.mark.parametrize("cached", [False, True])
def test_masks_are_cut_and_mirrored_like_their_pictures(tmp_path, streamed, kind, cached):
    folder, masks = masked(tmp_path)
    seen = dict(masks=str(masks) if kind == "files" else "alpha", mask=kind, unmasked=0.25, flip=True)
    stream = streamed(folder, 32, **seen)
    if cached:
        stream = streamed(folder, 32, encoded=encoded(stream), **seen)
    upright, mirrored = (next(p for p in range(99) if stream.flipped(p) == flip) for flip in (False, True))
    row = torch.tensor([1, 1, 0.25, 0.25])
    assert torch.equal(stream.batch({upright: 0}, 1.0).mask, row.expand(1, 1, 4, 4))
    assert torch.equal(stream.batch({mirrored: 0}, 1.0).mask, row.flip(0).expand(1, 1, 4, 4))


@pytest.mark.parametrize("edited", ["x", "masks"])
def test_what_is_read_in_the_loop_is_what_was_read_at_the_start(tmp_path, streamed, edited):
    folder, masks = masked(tmp_path)
    stream = streamed(folder, 32, masks=str(masks), mask="files")
    stream.batch({0: 0}, 1.0)
    Image.new("L", (32, 32), 90).save(tmp_path / edited / "0.png")
    with pytest.raises(FinetuneError, match=f"{edited}/0.png: has changed since"):
        stream.batch({0: 0}, 1.0)


def test_a_picture_whose_mask_leaves_nothing_is_named(tmp_path, streamed):
    folder, masks = masked(tmp_path)
    Image.new("L", (32, 32), 0).save(masks / "0.png")
    stream = streamed(folder, 32, masks=str(masks), mask="files")
    with pytest.raises(FinetuneError, match="0.png: its mask leaves nothing"):
        encoded(stream)
    cropped = streamed(folder, 32, masks=str(masks), mask="files", random_crop=True)        # encoded in every step
    note, = encode.check_masks(cropped)
    assert note.name == str(folder / "0.png") and "leaves nothing" in note.text
    assert not encode.check_masks(streamed(folder, 32, masks=str(masks), mask="files", unmasked=0.1))
