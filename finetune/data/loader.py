"""From a step of the run to its batches, made ahead by threads while the model computes.

A run sees one or two streams: the pictures that are learned, and those of the class for prior preservation. A step takes
up to `size` examples of each (see order.py). The loss of a step is the mean over its examples of the one plus, weighted,
the mean over those of the other, as DreamBooth has it (Ruiz et al. 2023, eq. 2), however the step is split into batches
and processes: each batch carries its share.

The example in slot i of step s has position s · size + i, counted from a far number of its own in the streams that are not
the first; with the run's seed it decides every draw.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.batch import Batch, Conditioning, joined
from finetune.data import beside, pictures
from finetune.data.captions import Captions
from finetune.data.index import Index
from finetune.data.order import Order
from finetune.data.pixels import CENTRE, Crop, fit, fit_mask, plan_crop
from finetune.diffusion import noise


T, U = TypeVar("T"), TypeVar("U")


@dataclass(frozen=True)
class View:
    """How pictures are seen."""

    reading: pictures.Reading
    random_crop: bool
    flip: bool              # half of the draws are mirrored
    mask: str | None        # "alpha", "files" or None
    unmasked: float         # weight of what the mask leaves out
    stride: int             # pixels per latent
    # What is shown beside the latents: the picture without a hole, drawn or read; a small one; a condition that is read.
    shows: Literal["random", "files", "small", "condition"] | None = None
    whole: float = 0.0      # share of the draws whose hole is all of the picture


@dataclass(frozen=True)
class Encoded:
    """Everything the frozen encoders have to say, computed once."""

    latents: Callable[[int, bool], dict[str, Tensor]] | None    # (example, mirrored) -> moments (2C, h, w) and, where there
    #                                                             is one, mask (1, h, w). None: crops are random
    text: Callable[[str], Conditioning] | None                  # caption -> batch of one. None: encoded in every step
    sample: Callable[[Tensor, Tensor], Tensor]                  # (moments, noise) -> latents


@dataclass(frozen=True)
class Stream:
    """Examples in an order."""

    index: Index
    sizes: np.ndarray       # (N, 2) height and width that each is fitted to
    captions: Captions
    view: View
    order: Order
    encoded: Encoded | None = None      # None: pictures and captions come as they are
    weight: float = 1.0
    first: int = 0                      # position of its first example

    def crop(self, example: int, position: int) -> Crop:
        where, size = CENTRE, tuple(self.sizes[example].tolist())
        if self.view.random_crop:
            where = tuple(noise.uniform(self.order.seed, position, f"crop {axis}") for axis in "yx")
        return plan_crop(int(self.index.width[example]), int(self.index.height[example]), size, where)

    def flipped(self, position: int) -> bool:
        return self.view.flip and noise.uniform(self.order.seed, position, "flip") < 0.5

    def caption(self, example: int, position: int) -> str:
        return self.captions.caption(self.index.columns(example), self.order.seed, position)

    def positions(self, step: int, slots: range) -> dict[int, int]:
        """position → example of the slots of a step that are filled."""
        examples = self.order.examples(step)
        base = self.first + step * self.order.size
        return {base + slot: int(examples[slot]) for slot in slots if slot < len(examples)}

    def batch(self, chosen: dict[int, int], share: float) -> Batch:
        seed, positions = self.order.seed, list(chosen)
        crops = [self.crop(example, position) for position, example in chosen.items()]
        flips = [self.flipped(position) for position in positions]
        captions = [self.caption(example, position) for position, example in chosen.items()]
        pixels = latents = shown = conditioning = None
        if self.encoded and self.encoded.latents:
            found = [self.encoded.latents(example, flip) for example, flip in zip(chosen.values(), flips)]
            moments = torch.stack([entry["moments"] for entry in found])
            shape = (moments.shape[1] // 2, *moments.shape[2:])
            latents = self.encoded.sample(moments, noise.normal(shape, seed, positions, "posterior"))
        else:
            found = [dict(zip(("pixels", "mask"), view_pixels(self.index, example, self.view, crop, flip)))
                     for example, crop, flip in zip(chosen.values(), crops, flips)]
            pixels = torch.stack([entry["pixels"] for entry in found])
        if self.view.shows:     # cached latents or not: what a hole leaves differs from draw to draw
            seen = [None] * len(crops) if pixels is None else pixels
            shown = torch.stack([self.shown(*one) for one in zip(chosen.items(), seen, crops, flips)])
        if self.encoded and self.encoded.text:
            conditioning = joined([self.encoded.text(caption) for caption in captions])
        return Batch(positions, captions, torch.full((len(positions),), self.weight), share,
                     torch.tensor([crop.geometry(flip) for crop, flip in zip(crops, flips)]), pixels, latents,
                     torch.stack([entry["mask"] for entry in found]) if self.view.mask else None, conditioning, shown)

    def shown(self, where: tuple[int, int], pixels: Tensor | None, crop: Crop, flip: bool) -> Tensor:
        """What the network is shown of the example at a position, see data/beside.py; its pixels may be read already."""
        (position, example), name = where, self.index.name(where[1])
        if self.view.shows == "condition":
            picture = pictures.read(self.index.read_beside(example, "shown"), f"the condition of {name}", self.view.reading)
            return beside.condition(picture, crop, flip)
        if pixels is None:
            pixels = view_pixels(self.index, example, replace(self.view, mask=None), crop, flip)[0]
        if self.view.shows == "small":
            return beside.small(pixels, self.view.stride)
        if noise.uniform(self.order.seed, position, "whole hole") < self.view.whole:
            hole = torch.ones_like(pixels[:1])
        elif self.view.shows == "random":
            hole = beside.random_hole(crop.height, crop.width, self.order.seed, position)
        else:
            mask = pictures.mask(self.index.read_beside(example, "shown"), f"the mask of {name}", self.view.reading)
            hole = beside.fit_hole(mask, crop, flip)
        return beside.without(pixels, hole)


def view_pixels(index: Index, example: int, view: View, crop: Crop, flip: bool) -> list[Tensor]:
    """Pixels (3, H, W) and, where there are masks, the mask (1, h, w)."""
    name, data = index.name(example), index.read(example)
    seen = [fit(pictures.read(data, name, view.reading), crop, flip)]
    if view.mask:
        mask = whole_mask(index, example, view, data)
        seen.append(torch.ones(1, crop.height // view.stride, crop.width // view.stride) if mask is None
                    else fit_mask(mask, crop, flip, view.stride, view.unmasked))
    return seen


def whole_mask(index: Index, example: int, view: View, data: bytes | None = None) -> Image.Image | None:
    """The mask before it is cut; None for an opaque picture, which counts everywhere. `data` may have been read already."""
    name = index.name(example)
    if view.mask == "alpha":
        return pictures.alpha(data or index.read(example), name, view.reading)
    return pictures.mask(index.read_beside(example, "mask"), f"the mask of {name}", view.reading)


class Loader:
    """The batches of each step for one process. `part` counts the batches of a step over accumulation and processes:
    consecutive slots are dealt out, so that any split sees the same examples."""

    def __init__(self, streams: list[Stream], batch_size: int, accumulation: int, process: int, processes: int, workers: int):
        self.streams, self.workers = streams, workers
        self.batch_size, self.accumulation, self.process, self.processes = batch_size, accumulation, process, processes

    def batches(self, step: int) -> list[Batch]:
        """What this process sees in a step: one batch or more, whose losses are summed up."""
        found = []
        for micro in range(self.accumulation):
            first = (micro * self.processes + self.process) * self.batch_size
            for stream in self.streams:
                if chosen := stream.positions(step, range(first, first + self.batch_size)):
                    count = len(stream.order.examples(step))
                    found.append(stream.batch(chosen, self.processes / count))      # processes: their gradients are averaged
        if not found:       # fewer examples than processes: this one takes part with an example that counts nothing
            found.append(self.streams[0].batch(self.streams[0].positions(step, range(1)), 0.0))
        return found

    def run(self, steps: Iterable[int]) -> Iterator[list[Batch]]:
        """The batches of each step in turn, read ahead by `workers` threads."""
        if not self.workers:
            yield from map(self.batches, steps)
            return
        with ThreadPoolExecutor(self.workers, "loader") as pool:
            yield from ahead(pool, self.batches, steps, self.workers)


def ahead(pool: ThreadPoolExecutor, work: Callable[[T], U], items: Iterable[T], depth: int) -> Iterator[U]:
    """work(item) for each item in turn, begun up to `depth` items early."""
    begun: deque[Future] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > depth:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
