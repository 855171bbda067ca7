"""What is kept is what the encoder gives, bit for bit, and never what was made from something else."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.batch import Conditioning
from finetune.data import cache, encode, pixels
from finetune.data.cache import Cache, Rows, key
from finetune.data.loader import CENTRE, View
from finetune.data.scan import scan
from finetune.errors import FinetuneError

N = 7       # pictures in the fixture
VIEW = View(16, False, True, "{text}", 0.1)


def same(some, others) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def test_what_is_kept_is_what_is_made(folder, encoder, store):
    plain = encoder.everything(folder, None)
    assert encoder.calls() == (2 * N, N + 1)
    assert same(encoder.everything(folder, Cache(store)), plain) and encoder.calls() == (2 * N, N + 1)
    assert same(encoder.everything(folder, Cache(store)), plain) and encoder.calls() == (0, 0)
    assert all(t.dtype == torch.float32 for t in plain)
    assert len(list(store.iterdir())) == 4      # pictures and captions, a shard each


def test_one_more_picture_is_one_more_call(folder, encoder, store):
    encoder.everything(folder, Cache(store))
    encoder.calls()
    Image.new("RGB", (20, 30), "navy").save(folder / "0new.png")        # the first by name: all numbers move
    (folder / "0new.txt").write_text("a navy sheet")
    found = encoder.everything(folder, Cache(store))
    assert encoder.calls() == (2, 1)
    assert same(found, encoder.everything(folder, None))


def test_an_edited_picture_is_encoded_again_and_a_renamed_one_is_not(folder, encoder, store):
    encoder.everything(folder, Cache(store))
    encoder.calls()
    old = (folder / "3.png").stat()
    Image.new("RGB", (49, 36), "navy").save(folder / "3.png")
    os.utime(folder / "3.png", ns=(old.st_atime_ns, old.st_mtime_ns))
    found = encoder.everything(folder, Cache(store))
    assert encoder.calls() == (2, 0)
    assert same(found, encoder.everything(folder, None))
    encoder.calls()
    folder.rename(folder.with_name("moved"))
    encoder.everything(folder.with_name("moved"), Cache(store))
    assert encoder.calls() == (0, 0)


def test_nothing_is_used_for_what_it_was_not_made_for(folder, encoder, store, monkeypatch):
    def calls(**changes):
        found = encoder.everything(folder, Cache(store), **changes)
        made = encoder.calls()
        assert same(found, encoder.everything(folder, None, **(changes | {"who": ""})))
        encoder.calls()
        return made

    assert calls() == (2 * N, N + 1)
    assert calls(resolution=24) == (2 * N, 0)
    assert calls(who="other weights") == (2 * N, N + 1)
    assert calls(flip=False, dropout=0.0) == (0, 0)
    monkeypatch.setattr(encode, "PIXELS", 2)
    assert calls() == (2 * N, 0)
    monkeypatch.setattr(cache, "FORMAT", 2)
    assert calls() == (2 * N, N + 1)


def test_pixels_are_what_their_number_promises(tmp_path):
    """If this fails, pixels.py makes other pixels than before: raise encode.PIXELS, so that old latents are not used."""
    ramp = np.arange(37 * 53 * 4).reshape(37, 53, 4) * 7919 % 256
    for suffix, channels in (("png", 4), ("bmp", 3)):
        Image.fromarray(ramp[..., :channels].astype(np.uint8)).save(tmp_path / f"x.{suffix}")
    whole = hashlib.sha256()
    for suffix in ("png", "bmp"):
        image = pixels.read(tmp_path / f"x.{suffix}")
        for resolution in (16, 48):
            crop = pixels.plan_crop(image.width, image.height, resolution, CENTRE)
            whole.update((pixels.fit(image, crop, True) * 127.5 + 127.5).round().byte().numpy().tobytes())
    assert (encode.PIXELS, whole.hexdigest()[:16]) == (1, "e54c2d9b796f786f")


def test_equal_pictures_are_encoded_once(folder, encoder, store):
    shutil.copy(folder / "1.png", folder / "twin.png")
    (folder / "twin.txt").write_text("a twin")
    encoder.everything(folder, Cache(store))
    assert encoder.calls() == (2 * N, N + 2)


def test_a_picture_that_changes_during_the_run_is_not_kept_as_the_old_one(folder, encoder, store):
    examples = scan(str(folder), "{text}")
    Image.new("RGB", (40, 36), "navy").save(folder / "0.png")
    for _ in range(2):
        with pytest.raises(FinetuneError, match="0.png: has changed"):
            encode.pictures(examples, VIEW, encoder.moments, True, Cache(store))
        (folder / "0.png").unlink(missing_ok=True)


def test_numbers_that_are_not_finite_never_get_in(folder, encoder, store):
    examples = scan(str(folder), "{text}")
    for value in (float("nan"), float("inf")):
        with pytest.raises(FinetuneError, match="0.png.*not finite"):
            encode.pictures(examples, VIEW, lambda x: encoder.moments(x) * value, True, Cache(store))
        with pytest.raises(FinetuneError, match="not finite"):
            encode.texts(examples, VIEW, lambda c: Conditioning(encoder.text(c).tokens * value), True, Cache(store))
    assert cache.contents(store) == {}


def entry(number: int) -> dict:
    return {"x": torch.full((100,), number, dtype=torch.float32)}


def test_a_shard_has_a_size(store, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 2000)
    keys = [key(n) for n in range(30)]
    Rows(Cache(store), "x", keys, entry).fill(True, "x")
    assert 5 < len(list(store.glob("*.data"))) < 30
    rows = Rows(Cache(store), "x", keys, None)
    assert all(torch.equal(rows[n]["x"], entry(n)["x"]) for n in range(30))


def test_keys_tell_everything_apart():
    keys = [key("a", 1), key("a", "1"), key("a", True), key("a1"), key(["a", 1]), key("a", None), key({"a": 1}), key()]
    assert len(set(keys)) == len(keys) and all(len(k) == 32 for k in keys)
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})


def test_what_is_not_used_is_collected(folder, encoder, store):
    encoder.everything(folder, Cache(store))
    encoder.everything(folder, Cache(store), resolution=24)
    assert {kind: entries for kind, (entries, _) in cache.contents(store).items()} == {"moments": 4 * N, "text": N + 1}
    for file in store.iterdir():
        os.utime(file, (0, 0))
    encoder.everything(folder, Cache(store))       # in use: resolution 16 and the captions
    size = sum(f.stat().st_size for f in store.iterdir())
    (store / "moments-0-dead.data").write_bytes(b"what a kill left")
    os.utime(store / "moments-0-dead.data", (0, 0))
    freed = cache.collect(store, 30)
    assert freed == size - sum(f.stat().st_size for f in store.iterdir()) + 16 > 16
    encoder.calls()
    encoder.everything(folder, Cache(store))
    assert encoder.calls() == (0, 0) and cache.contents(store)["moments"][0] == 2 * N
    cache.collect(store, 0)
    assert cache.contents(store) == {} and cache.collect(store / "nowhere", 0) == 0
