"""What the tests of the cache share."""

import hashlib
import shutil

import pytest
import torch

from finetune.batch import Conditioning
from finetune.data import encode


class Encoder:
    """A stand-in for a VAE and a text encoder that counts its calls."""

    def __init__(self, streamed):
        self.pictures = self.captions = 0
        self.streamed = streamed

    def moments(self, pixels):
        self.pictures += 1
        return torch.cat([torch.nn.functional.avg_pool2d(pixels, 8)] * 2, 1)

    def text(self, captions):
        self.captions += 1
        tokens = torch.tensor([[list(hashlib.sha256(c.encode()).digest())] for c in captions]) / 7
        return Conditioning(tokens, tokens[:, 0] + 1)

    def calls(self) -> tuple[int, int]:
        """Calls since the last time."""
        calls, self.pictures, self.captions = (self.pictures, self.captions), 0, 0
        return calls

    def everything(self, folder, store, who="weights", resolution=16, flip=True, dropout=0.1) -> list[torch.Tensor]:
        """All that is said of a folder, with the cache or without."""
        stream = self.streamed(folder, resolution, flip=flip, dropout=dropout)
        latents = self.latents(stream, store, who)
        text = self.texts(stream, store, who)
        columns = map(stream.index.columns, range(len(stream.index)))
        states = [text(caption) for caption in [c["text"] for c in columns] + [""] * bool(dropout)]
        return ([latents(n, mirrored)["moments"] for n in range(len(stream.index)) for mirrored in range(1 + flip)]
                + [t for s in states for t in (s.tokens, s.pooled)])

    def latents(self, stream, store, who="weights", moments=None):
        return encode.pictures(stream.index, stream.sizes, stream.view, moments or self.moments, True, store, who)

    def texts(self, stream, store, who="weights", text=None):
        return encode.texts([(stream.index, stream.captions)], text or self.text, lambda caption: "", True, store, who)


@pytest.fixture
def encoder(streamed):
    return Encoder(streamed)


@pytest.fixture
def folder(tmp_path, pictures):
    """A copy of the pictures that may be changed."""
    shutil.copytree(pictures, tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def store(tmp_path):
    """Where a cache may be; nothing is there yet."""
    return tmp_path / "store"
