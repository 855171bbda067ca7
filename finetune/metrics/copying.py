"""Copies of training pictures: the share that shows one anew, by its hash, and how near the nearest is, by features."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from finetune.data.duplicates import BITS
from finetune.data.pictures import difference_hashes, shrunk
from finetune.metrics.base import Measured, Painted, mean, share, unit

NEEDS, MODEL, BETTER = {"training"}, "facebook/dinov2-base", ""


def measure(painted: Painted, eye) -> dict[str, Measured]:
    """`copies`: the share whose hash differs from a training picture's in BITS bits at most. `nearest`: mean of the highest
    cosine to one. The nearest of a picture is the one of the most equal features, or hash where that is a copy."""
    cosines_NM = unit(eye.pictures(painted.pictures)) @ unit(eye.pictures(painted.training)).T
    bits_NM = np.bitwise_count(hashes(painted.pictures)[:, None] ^ hashes(painted.training))
    rows = np.arange(len(cosines_NM))
    copies = bits_NM.min(1) <= BITS
    at = np.where(copies, bits_NM.argmin(1), cosines_NM.argmax(1))
    order = np.lexsort((-cosines_NM[rows, at], ~copies))
    nearest = tuple((int(i), int(at[i]), float(cosines_NM[i, at[i]]), int(bits_NM[i, at[i]])) for i in order)
    return {"copies": replace(share(copies.astype(float)), nearest=nearest), "nearest": mean(cosines_NM.max(1))}


def hashes(album: Sequence) -> np.ndarray:
    return difference_hashes([shrunk(album[i]) for i in range(len(album))])
