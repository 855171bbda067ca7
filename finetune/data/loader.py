"""From a position in the run to a batch.

Example `position` of a run is example `position % N` of epoch `position // N`; each epoch's order is a permutation
drawn from (seed, epoch). So every example is seen exactly once in each epoch, any position can be had directly, and a
resumed run or another number of processes sees the same stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finetune.batch import Batch, Conditioning
from finetune.data.captions import caption
from finetune.data.pixels import Crop, fit, plan_crop, read
from finetune.data.scan import Example
from finetune.diffusion import noise

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class View:
    """How the pictures and captions are seen."""

    resolution: int
    random_crop: bool
    flip: bool              # half of the draws are mirrored
    template: str
    dropout: float          # share of draws whose caption is empty, for classifier-free guidance


@dataclass(frozen=True)
class Encoded:
    """Everything the frozen encoders have to say, computed once."""

    moments: Callable[[int, bool], Tensor] | None   # (example, mirrored) -> (2C, h, w). None: crops are random
    text: Callable[[str], Conditioning] | None      # caption -> batch of one. None: the text encoder is trained
    sample: Callable[[Tensor, Tensor], Tensor]      # (moments, noise) -> latents


class Loader:
    """Batches of `examples` by position. With `encoded`, pictures are not opened again."""

    def __init__(self, examples: list[Example], view: View, seed: int, encoded: Encoded | None = None):
        self.examples, self.view, self.seed, self.encoded = examples, view, seed, encoded
        self.order = lru_cache(2)(lambda epoch: noise.permutation(len(examples), seed, epoch, "order"))

    def example(self, position: int) -> int:
        """The index of the example that is seen at a position."""
        epoch, place = divmod(position, len(self.examples))
        return int(self.order(epoch)[place])

    def caption(self, position: int) -> str:
        if noise.uniform(self.seed, position, "caption dropout") < self.view.dropout:
            return ""
        return caption(self.view.template, self.examples[self.example(position)].columns)

    def flipped(self, position: int) -> bool:
        return self.view.flip and noise.uniform(self.seed, position, "flip") < 0.5

    def crop(self, position: int) -> Crop:
        example, where = self.examples[self.example(position)], CENTRE
        if self.view.random_crop:
            where = tuple(noise.uniform(self.seed, position, f"crop {axis}") for axis in "yx")
        return plan_crop(example.width, example.height, self.view.resolution, where)

    def batch(self, positions: list[int]) -> Batch:
        captions, crops = [self.caption(p) for p in positions], [self.crop(p) for p in positions]
        pixels = latents = conditioning = None
        if self.encoded and self.encoded.moments:
            moments = torch.stack([self.encoded.moments(self.example(p), self.flipped(p)) for p in positions])
            shape = (moments.shape[1] // 2, *moments.shape[2:])
            latents = self.encoded.sample(moments, noise.normal(shape, self.seed, positions, "posterior"))
        else:
            files = [self.examples[self.example(p)].file for p in positions]
            pixels = torch.stack([fit(read(file), crop, self.flipped(p))
                                  for file, crop, p in zip(files, crops, positions)])
        if self.encoded and self.encoded.text:
            states = [self.encoded.text(c) for c in captions]
            pooled = None if states[0].pooled is None else torch.cat([s.pooled for s in states])
            conditioning = Conditioning(torch.cat([s.tokens for s in states]), pooled)
        return Batch(positions, captions, torch.ones(len(positions)),
                     torch.tensor([crop.geometry for crop in crops]), pixels, latents, conditioning)

