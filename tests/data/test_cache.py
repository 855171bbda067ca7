"""What is kept is what the encoder gives, bit for bit, and never what was made from something else."""

import hashlib
import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.batch import Conditioning
from finetune.data import cache, encode, memory, pictures, pixels
from finetune.data.cache import Cache, Rows, key
from finetune.errors import FinetuneError

N = 7       # pictures in the fixture


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
    monkeypatch.setattr(encode, "PIXELS", 0)
    assert calls() == (2 * N, 0)
    monkeypatch.setattr(cache, "FORMAT", 2)
    assert calls() == (2 * N, N + 1)


def test_pixels_are_what_their_number_promises():
    """If this fails, pictures.py or pixels.py makes other pixels: raise encode.PIXELS, so that old latents are not used."""
    ramp = np.arange(37 * 53 * 4).reshape(37, 53, 4) * 7919 % 256
    whole = hashlib.sha256()
    for suffix, channels in (("PNG", 4), ("BMP", 3)):
        file = io.BytesIO()
        Image.fromarray(ramp[..., :channels].astype(np.uint8)).save(file, suffix)
        image = pictures.read(file.getvalue(), "x")
        for size in ((16, 16), (48, 48), (24, 32)):
            crop = pixels.plan_crop(image.width, image.height, size)
            whole.update((pixels.fit(image, crop, True) * 127.5 + 127.5).round().byte().numpy().tobytes())
    assert (encode.PIXELS, whole.hexdigest()[:16]) == (2, "ab1c34310da2304a")


def test_equal_pictures_are_encoded_once(folder, encoder, store):
    shutil.copy(folder / "1.png", folder / "twin.png")
    (folder / "twin.txt").write_text("a twin")
    encoder.everything(folder, Cache(store))
    assert encoder.calls() == (2 * N, N + 2)


def test_a_picture_that_changes_during_the_run_is_not_kept_as_the_old_one(folder, encoder, store, streamed):
    stream = streamed(folder)
    Image.new("RGB", (40, 36), "navy").save(folder / "0.png")
    with pytest.raises(FinetuneError, match="0.png: has changed"):
        encoder.latents(stream, Cache(store))
    (folder / "0.png").unlink()
    with pytest.raises(FinetuneError, match="0.png"):
        encoder.latents(stream, Cache(store))


def test_numbers_that_are_not_finite_never_get_in(folder, encoder, store, streamed):
    stream = streamed(folder, flip=True)
    for value in (float("nan"), float("inf")):
        with pytest.raises(FinetuneError, match="0.png.*not finite"):
            encoder.latents(stream, Cache(store), moments=lambda x: encoder.moments(x) * value)
        with pytest.raises(FinetuneError, match="not finite"):
            encoder.texts(stream, Cache(store), text=lambda c: Conditioning(encoder.text(c).tokens * value))
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
    freed = memory.collect(store, 30)
    assert freed == size - sum(f.stat().st_size for f in store.iterdir()) + 16 > 16
    encoder.calls()
    encoder.everything(folder, Cache(store))
    assert encoder.calls() == (0, 0) and cache.contents(store)["moments"][0] == 2 * N
    memory.collect(store, 0)
    assert cache.contents(store) == {} and memory.collect(store / "nowhere", 0) == 0
