"""Pictures that show the same: equal files, and copies that were scaled or compressed anew.

The hashes of the index say who is looked at; a thumbnail of it decides. Nothing compares all with all: hashes meet where
some of their bits are equal, thumbnails where their means are near."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
from PIL import Image

from finetune.data.index import Index, concatenated
from finetune.data.pictures import Reading, read

BITS = 6            # hashes of copies differ in so many of the 64 bits at most …
BANDS = 9           # … so at least BANDS - BITS of as many parts are equal
CROWD = 16          # more hashes than this with the same parts are all looked at

SIDE = 16           # of a thumbnail, in cells
NEAR = 8.0          # root mean square of the difference between thumbnails of copies, of 255: JPEG at quality 50 makes up to
SPOT = 32.0         # 7 in a drawing of 64 px and 3 in one of 256 px. And of one cell: an eye of another colour is no copy

H = np.array([[1, 1], [1, -1]])
SIGNS = np.kron(np.kron(H, H), [[1, 1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]]).T / 12      # of the 2 × 2 quarters' colours
LEAF = 256          # so few thumbnails are compared with each other


def copies(index: Index, reading: Reading) -> list[list[int]]:
    """The groups of two pictures or more that show the same, each sorted, in the order of their first ones."""
    first = originals(index, reading)
    several = np.flatnonzero(np.bincount(first, minlength=len(first))[first] > 1)
    several = several[np.argsort(first[several], kind="stable")]
    starts = np.flatnonzero(np.diff(first[several])) + 1
    return [group.tolist() for group in np.split(several, starts)] if len(several) else []


def overlap(train: Index, held: Index, reading: Reading) -> list[tuple[int, int]]:
    """(picture of the one, picture of the other) for all of the other that the one shows too."""
    first = originals(concatenated([train, held]), reading)
    return [(int(first[i]), i - len(train)) for i in range(len(train), len(first)) if first[i] < len(train)]


def originals(index: Index, reading: Reading) -> np.ndarray:
    """(N,) the first picture that shows the same as each: itself where there is none before it."""
    digests = np.ascontiguousarray(index.digest).view("S32").ravel()
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    rows = np.sort(first)                               # one of each content
    looked = rows[crowded(index.phash[rows])]
    root = np.arange(len(index))
    for a, b in links(thumbnails(index, looked, reading)):
        low, high = sorted((_root(root, looked[a]), _root(root, looked[b])))
        root[high] = low
    for row in looked:                                  # all others stand for themselves
        root[row] = _root(root, row)
    return root[first[which]]


def _root(root: np.ndarray, row: int) -> int:
    while root[row] != row:
        root[row] = row = root[root[row]]
    return row


def crowded(hashes: np.ndarray) -> np.ndarray:
    """(N,) whether there is another hash within BITS bits, or too many are about to tell."""
    values, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    found = counts > 1
    # Every ninth bit, so from all over the picture: a blank corner fills no part.
    parts = [sum((values >> np.uint64(bit) & np.uint64(1)) << np.uint64(n) for n, bit in enumerate(range(part, 64, BANDS)))
             for part in range(BANDS)]
    for chosen in combinations(parts, BANDS - BITS):
        key = sum(part << np.uint64(10 * n) for n, part in enumerate(chosen)).astype(np.uint32)
        order = np.argsort(key)
        key, near_by = key[order], values[order]
        at = np.arange(len(order))
        for step in range(1, CROWD):
            at = at[at + step < len(order)]
            at = at[key[at] == key[at + step]]
            near = at[np.bitwise_count(near_by[at] ^ near_by[at + step]) <= BITS]
            found[order[near]] = found[order[near + step]] = True
        for step in range(CROWD if len(at) else 0):
            found[order[at + step]] = True
    return found[which]


def thumbnails(index: Index, rows: np.ndarray, reading: Reading) -> np.ndarray:
    """(n, SIDE, SIDE, 3) 8-bit: the means of the cells."""
    def thumbnail(row: int) -> np.ndarray:
        picture = read(index.read(row), index.name(row), reading)
        return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX))

    with ThreadPoolExecutor(2) as pool:
        return np.stack([*pool.map(thumbnail, rows.tolist())]) if len(rows) else np.zeros((0, SIDE, SIDE, 3), np.uint8)


def links(thumbs: np.ndarray) -> Iterator[tuple[int, int]]:
    """Enough pairs of copies to join all."""
    quarters = thumbs.reshape(len(thumbs), 2, SIDE // 2, 2, SIDE // 2, 3).mean((2, 4), dtype=np.float32)
    for rows in _neighbours(quarters.reshape(len(thumbs), 12) @ SIGNS, np.arange(len(thumbs))):
        cells = thumbs[rows].reshape(len(rows), SIDE ** 2, 3).astype(np.float32)
        whole = cells.reshape(len(rows), cells[0].size)
        square, left = (whole ** 2).sum(1), np.ones(len(rows), bool)
        for start in range(len(rows)):
            front = [start] if left[start] else []
            left[start] = False
            while front and left.any():
                one = front.pop()
                near = np.flatnonzero(left & (square + square[one] - 2 * (whole @ whole[one]) <= NEAR ** 2 * cells[0].size))
                same = near[((cells[near] - cells[one]) ** 2).mean(-1).max(-1) <= SPOT ** 2]
                yield from ((rows[one], rows[other]) for other in same)
                front += same.tolist()
                left[same] = False


def _neighbours(means: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Sets of rows such that copies are together in one: any mean of all cells with signs differs by NEAR at most."""
    if len(rows) > LEAF:
        low, high = means[rows].min(0), means[rows].max(0)
        axis = np.argmax(high - low)
        if high[axis] - low[axis] > 4 * NEAR:
            values, middle = means[rows, axis], (low[axis] + high[axis]) / 2
            yield from _neighbours(means, rows[values <= middle + NEAR])
            yield from _neighbours(means, rows[values > middle])
            return
    if len(rows):
        yield rows
