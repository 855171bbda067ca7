"""What the tests of the cache share."""

import hashlib
import shutil

import pytest
import torch

from finetune.batch import Conditioning
from finetune.data import encode
from finetune.data.loader import View
from finetune.data.scan import scan


class Encoder:
    """A stand-in for a VAE and a text encoder that counts its calls."""

    def __init__(self):
        self.pictures = self.captions = 0

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
        examples, view = scan(str(folder), "{text}"), View(resolution, False, flip, "{text}", dropout)
        moments = encode.pictures(examples, view, self.moments, True, store, who)
        text = encode.texts(examples, view, self.text, True, store, who)
        states = [text(caption) for caption in [e.columns["text"] for e in examples] + [""] * bool(dropout)]
        return ([moments(n, mirrored) for n in range(len(examples)) for mirrored in range(1 + flip)]
                + [t for s in states for t in (s.tokens, s.pooled)])


@pytest.fixture
def encoder():
    return Encoder()


@pytest.fixture
def folder(tmp_path, pictures):
    """A copy of the pictures that may be changed."""
    shutil.copytree(pictures, tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def store(tmp_path):
    """Where a cache may be; nothing is there yet."""
    return tmp_path / "store"
