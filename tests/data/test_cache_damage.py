"""The cache after kills, rot and a disk that refuses, and with other processes at it: right, and nearly as useful."""

import hashlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from finetune.data import cache
from finetune.data.cache import Cache, Rows, key
from finetune.errors import FinetuneError

N = 7       # pictures in the fixture


def same(some, others) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


class Kill(BaseException):
    """Nothing in the code under test may catch this."""


@pytest.mark.parametrize("torn", [0, 1, 47])
def test_a_kill_at_any_write_leaves_what_was_done(folder, encoder, store, monkeypatch, torn):
    """The process ends before the n-th open for writing, or with some bytes of that write on the disk."""
    plain, real = encoder.everything(folder, None), open

    def killing(at):
        count = 0

        def opened(file, mode="r", *args, **options):
            nonlocal count
            if "a" not in mode:
                return real(file, mode, *args, **options)
            count += 1
            if count == at:
                with real(file, "ab") as f:
                    f.write(b"\x5a" * torn)
                raise Kill
            return real(file, mode, *args, **options)
        return opened

    for at in (1, 2, 3, 4, 5, 12, 27, 28):      # 1, 3, 5 …: the data; 2, 4 …: the index
        shutil.rmtree(store, ignore_errors=True)
        monkeypatch.setattr(cache, "open", killing(at), raising=False)
        encoder.calls()
        with pytest.raises(Kill):
            encoder.everything(folder, Cache(store))
        monkeypatch.setattr(cache, "open", real)
        before = encoder.calls()[0]
        assert same(encoder.everything(folder, Cache(store)), plain)
        assert encoder.calls()[0] == 2 * N - (before - 1)       # only the one that was being written is made again


def flips(size: int) -> list[int]:
    return np.random.default_rng(0).integers(0, size, 12).tolist()


def test_a_flipped_bit_costs_one_entry_and_is_said_once(folder, encoder, store):
    plain = encoder.everything(folder, Cache(store))
    whole = store.with_name("whole")
    store.rename(whole)
    for name in sorted(p.name for p in whole.iterdir()):
        for at in flips((whole / name).stat().st_size):
            shutil.rmtree(store, ignore_errors=True)
            shutil.copytree(whole, store)
            data = bytearray((store / name).read_bytes())
            data[at] ^= 1 << at % 8
            (store / name).write_bytes(data)
            encoder.calls()
            said = []
            assert same(encoder.everything(folder, Cache(store, said.append)), plain)
            assert sum(encoder.calls()) == 1
            assert len(said) <= 1 and (said or name.endswith(".index"))
            assert same(encoder.everything(folder, Cache(store, said.append)), plain)      # and now it is sound
            assert encoder.calls() == (0, 0)


def test_files_that_are_cut_emptied_or_lost_cost_only_what_they_held(folder, encoder, store):
    plain = encoder.everything(folder, Cache(store))
    whole = store.with_name("whole")
    store.rename(whole)
    for name in sorted(p.name for p in whole.iterdir()):
        size = (whole / name).stat().st_size
        for left in (None, 0, 1, size // 2, size - 1):
            shutil.rmtree(store, ignore_errors=True)
            shutil.copytree(whole, store)
            (store / name).unlink() if left is None else os.truncate(store / name, left)
            encoder.calls()
            assert same(encoder.everything(folder, Cache(store)), plain)
            calls = encoder.calls()
            assert 0 < max(calls) and 0 == (calls[1] if name.startswith("moments") else calls[0])
            assert left != size - 1 or sum(calls) == 1


def test_an_entry_that_rots_during_the_run_is_made_again(folder, encoder, store, streamed):
    said = []
    latents = encoder.latents(streamed(folder, flip=True), Cache(store, said.append))
    first = latents(2, True)["moments"]
    encoder.calls()
    next(store.glob("*.data")).write_bytes(b"")
    assert torch.equal(latents(2, True)["moments"], first) and encoder.calls() == (1, 0) and len(said) == 1
    assert torch.equal(latents(2, True)["moments"], first) and encoder.calls() == (0, 0)


def test_a_disk_that_refuses_is_said_once_and_the_run_goes_on(folder, encoder, store, monkeypatch):
    plain, said = encoder.everything(folder, None), []
    store.write_text("a file, where the folder should be")
    held = Cache(store, said.append)
    encoder.calls()
    assert same(encoder.everything(folder, held), plain) and encoder.calls() == (2 * N, N + 1)
    assert same(encoder.everything(folder, held), plain) and encoder.calls() == (0, 0)
    assert len(said) == 1 and "cannot be written" in said[0] and "memory" in said[0]
    store.unlink()
    monkeypatch.setattr(cache, "RESERVE_BYTES", 2**80)      # a full disk
    said.clear()
    assert same(encoder.everything(folder, Cache(store, said.append)), plain)
    assert len(said) == 1 and "are free" in said[0]
    with pytest.raises(FinetuneError, match="FINETUNE_CACHE"):
        encoder.everything(folder, Cache(store, strict=True))


def test_a_cache_that_can_only_be_read_is_read(folder, encoder, store, monkeypatch):
    encoder.everything(folder, Cache(store))
    encoder.calls()
    monkeypatch.setattr("os.utime", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    monkeypatch.setattr(Cache, "_append", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    encoder.everything(folder, Cache(store))
    assert encoder.calls() == (0, 0)


WRITER = """
import hashlib, sys, torch
from pathlib import Path
from finetune.data.cache import Cache, Rows, key

rows = Rows(Cache(Path(sys.argv[1])), "x", [key(n) for n in range(300)], lambda n: {"x": torch.full((100,), n)})
sys.stdin.readline()        # all begin at once
rows.fill(True, "x")
print(hashlib.sha256(b"".join(rows[n]["x"].numpy().tobytes() for n in range(300))).hexdigest())
"""


def test_processes_that_write_at_once(store):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, store], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                text=True)
               for _ in range(3)]
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    found = {writer.communicate(timeout=60)[0].strip() for writer in writers}
    expected = [torch.full((100,), n) for n in range(300)]
    assert found == {hashlib.sha256(b"".join(t.numpy().tobytes() for t in expected)).hexdigest()}
    rows = Rows(Cache(store), "x", [key(n) for n in range(300)], None)
    assert not rows.missing() and same([rows[n]["x"] for n in range(300)], expected)
