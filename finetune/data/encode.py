"""The encoding pass: every picture and caption through the frozen encoders once, before the first step.

What the cache holds is not encoded again. `encoder` is whatever tells one encoder from another: its weights, the
settings that weights do not show, its kind of device."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from finetune.batch import Conditioning
from finetune.data.cache import Cache, Entry, Rows, key
from finetune.data.captions import caption
from finetune.data.loader import CENTRE, View
from finetune.data.pixels import UnreadablePicture, fit, plan_crop, read
from finetune.data.scan import Example
from finetune.errors import FinetuneError

PIXELS = 1      # another number when data/pixels.py makes other pixels of the same file: then all is encoded anew


def check(examples: list[Example], view: View, cut_text: Callable[[str], str]) -> None:
    """Raise FinetuneError with every picture that is too narrow and every caption that would be cut."""
    problems = []
    for example in examples:
        try:
            plan_crop(example.width, example.height, view.resolution, CENTRE)
        except FinetuneError as e:
            problems.append(f"{example.file}: {e}")
        if cut := cut_text(caption(view.template, example.columns)):
            problems.append(f"{example.file}: its caption is too long for the text encoder: it would lose {cut!r}")
    if problems:
        shown = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise FinetuneError("\n    ".join(["data.images: not all can be trained", *shown]))


def pictures(examples: list[Example], view: View, moments: Callable[[Tensor], Tensor], quiet: bool,
             cache: Cache | None = None, encoder: str = "") -> Callable[[int, bool], Tensor]:
    """(example's number, mirrored) → posterior moments (2C, h, w) on the CPU.

    One picture at a time, so that its latents do not depend on its neighbours. Raises FinetuneError, naming the file,
    when the encoder gives a number that is not finite."""
    opened = lru_cache(1)(lambda number: picture(examples[number]))     # both variants of a picture come in turn
    variants = 1 + view.flip

    def make(row: int) -> Entry:
        number, flip = divmod(row, variants)
        image = opened(number)
        crop = plan_crop(image.width, image.height, view.resolution, CENTRE)
        found = moments(fit(image, crop, bool(flip))[None])[0].cpu()
        if not found.isfinite().all():
            raise FinetuneError(f"{examples[number].file}: the VAE gives latents that are not finite; "
                                "try base.dtype: float32")
        return {"moments": found}

    shared = key(PIXELS, encoder, view.resolution, CENTRE)
    keys = (key(shared, example.digest, flip) for example in examples for flip in range(variants))
    rows = Rows(cache or Cache(), "moments", keys, make).fill(quiet, "img")
    return lambda number, mirrored: rows[number * variants + mirrored]["moments"]


def picture(example: Example) -> Image.Image:
    """The picture that was scanned: what an edited file shows must not be kept under the old content's key."""
    try:
        image = read(example.file)
        if hashlib.sha256(example.file.read_bytes()).hexdigest() == example.digest:
            return image
    except (UnreadablePicture, OSError):
        pass
    raise FinetuneError(f"{example.file}: has changed since it was read at the start; give the same command again")


def texts(examples: list[Example], view: View, encode: Callable[[list[str]], Conditioning], quiet: bool = True,
          cache: Cache | None = None, encoder: str = "") -> Callable[[str], Conditioning]:
    """Caption → its states on the CPU, for all that the run can draw. Raises FinetuneError, naming the file."""
    files: dict[str, Path | None] = {}      # of each caption, the first file that has it
    for example in examples:
        files.setdefault(caption(view.template, example.columns), example.file)
    if view.dropout:
        files.setdefault("", None)
    captions = list(files)
    numbers = {text: number for number, text in enumerate(captions)}

    @torch.no_grad()
    def make(number: int) -> Entry:
        text = captions[number]
        try:
            state = encode([text])
        except FinetuneError as e:
            raise FinetuneError(f"data.images: {files[text]}: {e}") from None
        if not state.tokens.isfinite().all():
            raise FinetuneError(f"the text encoder gives states that are not finite for {text!r}; "
                                "try base.dtype: float32")
        return {name: states.cpu() for name in ("tokens", "pooled") if (states := getattr(state, name)) is not None}

    rows = Rows(cache or Cache(), "text", (key(encoder, text) for text in captions), make).fill(quiet, "caption")
    return lambda text: Conditioning(**rows[numbers[text]])
