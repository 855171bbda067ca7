"""Which size each picture is fitted to.

Training at the pictures' own shapes (NovelAI's aspect ratio bucketing): a bucket is a size with about resolution²
pixels, and a picture goes to the one whose shape is nearest, so that little of it is cut away.
"""

import numpy as np

from finetune.errors import FinetuneError


def sizes(resolution: int, step: int, shortest: int | None = None, longest: int | None = None) -> np.ndarray:
    """(K, 2) heights and widths, multiples of `step` from `shortest` to `longest` (half and twice the resolution), with at
    most resolution² pixels; from tall to wide. Raises FinetuneError when there is none."""
    shortest, longest = shortest or resolution // 2, longest or resolution * 2
    sides = range(-(-shortest // step) * step, longest + 1, step)
    other = {side: min(resolution ** 2 // side, longest) // step * step for side in sides}
    found = {size for a, b in other.items() if b >= shortest for size in ((a, b), (b, a))}
    if not found:
        raise FinetuneError(f"data.buckets: no size with sides from {shortest} to {longest} in steps of {step} has as many "
                            f"pixels as {resolution} × {resolution}")
    return np.array(sorted(found, key=lambda size: size[1] / size[0]), np.int32)


def assign(height: np.ndarray, width: np.ndarray, sizes: np.ndarray, own: int | None = None) -> np.ndarray:
    """(N, 2) the size that each picture (N,) is fitted to: the one of nearest shape, by the ratio of the two shapes.

    With `own`, a picture smaller than that is not enlarged: its size is its own, rounded down to multiples of `own` and
    no more than the bucket's greatest side; 0 where nothing is left."""
    shapes = np.log(sizes[:, 1] / sizes[:, 0])
    found = sizes[np.searchsorted((shapes[1:] + shapes[:-1]) / 2, np.log(width / height))]
    if own:
        itself = np.minimum(np.stack([height, width], 1), sizes.max()) // own * own
        small = (found > np.stack([height, width], 1)).any(1)
        found = np.where(small[:, None], itself, found)
    return found.astype(np.int32)
