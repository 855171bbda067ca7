"""The encoding pass: every picture and caption through the frozen encoders once, before the first step.

What the cache holds is not encoded again. `encoder` is whatever tells one encoder from another: its weights, the
settings that weights do not show, its kind of device."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor

from finetune import errors
from finetune.batch import Conditioning
from finetune.data.cache import Cache, Entry, Rows, key
from finetune.data.captions import DEEPEST, Captions, too_deep
from finetune.data.index import Index
from finetune.data.loader import Stream, View, ahead, view_pixels, whole_mask
from finetune.data.pixels import plan_crop
from finetune.data.tables import MAX_CHARACTERS, Note
from finetune.errors import FinetuneError

PIXELS = 2          # another number when pictures.py or pixels.py make other pixels of the same file: then all is encoded anew
MAX_SCALED = 100_000_000
READERS = min(8, os.cpu_count() or 1)       # threads
NOTHING_COUNTS = "its mask leaves nothing to train; remove the picture or set data.mask.unmasked_weight"
Cut = Callable[[str], str]      # a caption → the end of it that the text encoder would lose


def refuse(problems: list[Note]) -> None:
    """Raise FinetuneError with the problems, if there are any."""
    errors.refuse([f"{note.name}: {note.text}" for note in problems], "data.images: not all can be trained")


def check_pictures(index: Index, sizes: np.ndarray) -> list[Note]:
    """What is wrong with the sizes that pictures are fitted to."""
    factor = np.maximum(sizes[:, 0] / index.height, sizes[:, 1] / index.width)
    narrow = np.flatnonzero(factor ** 2 * index.height * index.width > MAX_SCALED)
    return ([Note("size", index.name(i), f"{index.width[i]} × {index.height[i]} pixels are smaller than data.buckets.step; "
                  "remove it or allow data.buckets.upscale") for i in np.flatnonzero((sizes == 0).any(1))]
            + [Note("size", index.name(i), f"{index.width[i]} × {index.height[i]} pixels are too narrow: scaled to cover "
                    f"{sizes[i, 1]} × {sizes[i, 0]} they would fill the memory; crop the picture") for i in narrow])


def check_masks(stream: Stream) -> list[Note]:
    """The pictures of which nothing counts, where they are not encoded beforehand: that would tell."""
    index, view = stream.index, stream.view

    def empty(i: int) -> bool:
        mask = whole_mask(index, i, view)
        return mask is not None and mask.getbbox() is None

    with ThreadPoolExecutor(READERS) as pool:
        rows = range(len(index)) if view.mask and not view.unmasked else ()
        found = zip(rows, ahead(pool, empty, rows, READERS))
        return [Note("mask", index.name(i), NOTHING_COUNTS) for i, nothing in found if nothing]


def check_captions(index: Index, captions: Captions) -> list[Note]:
    """The pictures that no caption can be made of."""
    problems, named = [], captions.columns()
    for i in range(len(index)):
        columns = index.columns(i)
        problems += [Note("caption", index.name(i), f"the {name} beside it has {len(columns[name]):,} characters, and "
                          f"{MAX_CHARACTERS:,} are the most; is it a caption? Shorten it, or leave the picture out")
                     for name in named if len(columns.get(name, "")) > MAX_CHARACTERS]
        if captions.wildcards:
            problems += [Note("caption", index.name(i), f"the {name} beside it has more than {DEEPEST} braces in each other; "
                              "write its alternatives flat, or leave out data.caption.wildcards")
                         for name in named if too_deep(columns.get(name, ""))]
        if missing := captions.missing(columns):
            problems.append(Note("caption", index.name(i), f"no caption: it has no {', '.join(missing)}; write it into a .txt "
                                 "beside the picture or into metadata.jsonl, or set data.caption.template to a text "
                                 "without it"))
    return problems


def check_drawn(stream: Stream, steps: int, cut_text: Cut) -> list[Note]:
    """The captions that the run will draw and the text encoder would cut: for captions too many to be encoded beforehand."""
    problems, seen = [], set()
    for step in range(steps):
        for position, example in stream.positions(step, range(stream.order.size)).items():
            caption = stream.caption(example, position)
            if caption not in seen:
                seen.add(caption)
                problems += check_length(caption, stream.index.name(example), cut_text)
    return problems


def check_length(caption: str, name: str, cut_text: Cut) -> list[Note]:
    lost = cut_text(caption)
    shown = lost if len(lost) < 100 else f"{lost[:60]} … {lost[-30:]}"
    return [Note("long", name, f"its caption is too long for the text encoder: it would lose {shown!r}; shorten it, or set "
                 "data.caption.long to truncate or chunk")] if lost else []


def every_caption(streams: Iterable[tuple[Index, Captions]]) -> dict[str, str]:
    """All captions that the run can draw, each with the name of the first picture that has it."""
    found: dict[str, str] = {}
    for index, captions in streams:
        for i in range(len(index)):
            for caption in captions.every(index.columns(i)):
                if caption not in found:
                    found[caption] = index.name(i)
    return found


def pictures(index: Index, sizes: np.ndarray, view: View, moments: Callable[[Tensor], Tensor], quiet: bool,
             cache: Cache | None = None, encoder: str = "") -> Callable[[int, bool], Entry]:
    """(example's number, mirrored) → `moments`, the posterior's (2C, h, w), and `mask` (1, h, w) where there are masks.

    One picture at a time, so that its latents do not depend on its neighbours. Raises FinetuneError, naming the file,
    when the encoder gives a number that is not finite."""
    variants = 1 + view.flip

    def pixels(row: int) -> list[Tensor]:
        number, flip = divmod(row, variants)
        crop = plan_crop(int(index.width[number]), int(index.height[number]), tuple(sizes[number].tolist()))
        return view_pixels(index, number, view, crop, bool(flip))

    def make(row: int, seen: list[Tensor] | None = None) -> Entry:
        seen = seen or pixels(row)
        name = index.name(row // variants)
        found = moments(seen[0][None])[0].cpu()
        if not found.isfinite().all():
            raise FinetuneError(f"{name}: the VAE gives latents that are not finite; try base.dtype: float32")
        if view.mask and not seen[1].any():
            raise FinetuneError(f"{name}: {NOTHING_COUNTS}")
        return dict(zip(("moments", "mask"), (found, *seen[1:])))

    rows = Rows(cache or Cache(), "moments", keys(index, sizes, view, encoder), make)
    with ThreadPoolExecutor(READERS) as pool:   # the next pictures are read while one is encoded
        rows.fill(quiet, "img", lambda missing: ahead(pool, pixels, missing, 2 * READERS))
    return lambda number, mirrored: rows[number * variants + mirrored]


def keys(index: Index, sizes: np.ndarray, view: View, encoder: str) -> Iterator[str]:
    shared = key(PIXELS, encoder, astuple(view.reading), view.mask, view.unmasked if view.mask else None).encode()
    rows = np.concatenate([index.digest, index.mask_digest, sizes.astype("<u4").view(np.uint8)], 1)
    what, length = memoryview(rows).cast("B"), rows.shape[1]      # a million rows are not copied
    for start in range(0, len(what), length):
        for flip in range(1 + view.flip):
            known = hashlib.blake2b(what[start:start + length], digest_size=16, key=shared)
            known.update(bytes([flip]))
            yield known.hexdigest()


def texts(streams: Iterable[tuple[Index, Captions]], encode: Callable[[list[str]], Conditioning], cut_text: Cut,
          quiet: bool = True, cache: Cache | None = None, encoder: str = "") -> Callable[[str], Conditioning]:
    """Caption → its states on the CPU, for all that the run can draw. Raises FinetuneError, naming the files whose captions
    would be cut: only those that are not in the cache need be looked at."""
    found = every_caption(streams)
    every = list(found)
    numbers = {caption: number for number, caption in enumerate(every)}

    @torch.no_grad()
    def make(number: int) -> Entry:
        state = encode([every[number]])
        if not state.tokens.isfinite().all():
            raise FinetuneError(f"the text encoder gives states that are not finite for {every[number]!r}; "
                                "try base.dtype: float32")
        return {name: states.cpu() for name in ("tokens", "pooled") if (states := getattr(state, name)) is not None}

    rows = Rows(cache or Cache(), "text", (key(encoder, caption) for caption in every), make)
    refuse([problem for n in rows.missing() for problem in check_length(every[n], found[every[n]], cut_text)])
    rows.fill(quiet, "caption")
    return lambda caption: Conditioning(**rows[numbers[caption]])


