"""What a metric is: numbers about pictures, as functions of how often each picture counts. `_intervals.py` draws them anew.

A metric is a module with NEEDS (what has to be given beside prompts: see `train/evaluate.py`), MODEL (hub id of the network
that it looks with, None where there is no usual one), BETTER ("higher", "lower", or "" where that depends on what is wanted)
and `measure(painted, eye) -> {name: Measured}`. The eye is one of `_eye.py`, or what the module's own `eye(model)` makes; a
`check(prompts, eye)` refuses prompts before anything is painted.

Shapes: N pictures, R resamples, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data import pictures
from finetune.data.pixels import cut, plan_crop


class Album(Sequence):
    """Pictures that are opened when they are looked at, so that any number fits into memory."""

    def __init__(self, names: Sequence[str], read: Callable[[int], bytes], size: tuple[int, int] | None = None):
        """`size` (height, width) is what all are cut to."""
        self.names, self.read, self.size = names, read, size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Image.Image:
        picture = pictures.read(self.read(i), self.names[i])
        return cut(picture, plan_crop(*picture.size, self.size)) if self.size else picture

    def cut(self, size: tuple[int, int]) -> "Album":
        """The same pictures, cut to (height, width) as training cuts them."""
        return Album(self.names, self.read, size)


def album(files: Sequence[Path]) -> Album:
    return Album([str(file) for file in files], lambda i: files[i].read_bytes())


@dataclass(frozen=True)
class Painted:
    """What one model painted, and what that is compared with."""

    prompts: list[str]                  # of each picture
    pictures: Sequence[Image.Image]
    training: Sequence[Image.Image] | None = None
    plain: Sequence[Image.Image] | None = None          # of the plain prompts
    base: Sequence[Image.Image] | None = None           # what the base painted of them, from the same seeds


@dataclass(frozen=True)
class Measured:
    """A number about N pictures, as a function of how often each of them counts."""

    size: int
    of: Callable[[np.ndarray], np.ndarray]      # (R, N) → (R,); NaN where it cannot be told
    resampled: bool = True                      # whether pictures drawn anew say how uncertain it is
    right: np.ndarray | None = None             # (N,) 1, 0 or NaN, where the number is a share
    nearest: tuple[tuple[int, int, float, int], ...] = ()       # (picture, training picture, cosine, different bits)


def mean(values_N: np.ndarray) -> Measured:
    """Of what counts; NaN does not."""
    counts_N = (~np.isnan(values_N)).astype(float)
    return Measured(len(values_N), lambda w_RN: _share(w_RN @ np.nan_to_num(values_N), w_RN @ counts_N))


def share(right_N: np.ndarray) -> Measured:
    """Of those that are right, 1, among those that count, 1 and 0."""
    return replace(mean(right_N), right=right_N)


def over_pairs(values_NN: np.ndarray, counted_NN: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The mean over pairs that count of two different pictures; drawn twice, a picture makes no pair with itself."""
    counts_NN = counted_NN * (1.0 - np.eye(len(counted_NN)))
    return lambda w_RN: _share(((w_RN @ (values_NN * counts_NN)) * w_RN).sum(1), ((w_RN @ counts_NN) * w_RN).sum(1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)


def distances(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """(N,) 1 − cosine of each two rows, in the form that is 0 for equal ones."""
    return np.square(unit(a_ND) - unit(b_ND)).sum(1) / 2
