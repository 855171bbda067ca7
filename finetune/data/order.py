"""Which examples each step sees, as a pure function of (seed, epoch).

An epoch shows every example exactly its `repeats` times. A step's examples share one bucket, so that they fit into one
tensor, and are at most `size`, the pictures of a step over all its batches and processes: the last of each bucket is a
smaller step, nothing is dropped and nothing is filled up. Neither the examples of a bucket nor the buckets follow each
other in a fixed order. Since the split of a step into batches and processes decides nothing, any split sees the same.
"""

from functools import lru_cache

import numpy as np

from finetune.diffusion import noise


class Order:
    def __init__(self, bucket: np.ndarray, repeats: np.ndarray, size: int, seed: int, stream: str = "order"):
        """`bucket` (N,) a number of each example's bucket; `repeats` (N,)."""
        self.size, self.seed, self.stream = size, seed, stream
        self.slots = np.repeat(np.arange(len(bucket)), repeats)
        _, self.bucket = np.unique(bucket[self.slots], return_inverse=True)
        self.counts = np.bincount(self.bucket)              # slots of each bucket
        self.steps = int((-(-self.counts // size)).sum())   # of an epoch
        self.epoch = lru_cache(2)(self._epoch)

    def examples(self, step: int) -> np.ndarray:
        """The numbers of the examples of a step of the run, at most `size`."""
        epoch, place = divmod(step, self.steps)
        row = self.epoch(epoch)[place]
        return row[row >= 0]

    def _epoch(self, epoch: int) -> np.ndarray:
        """(steps, size) numbers of examples, -1 where a step is smaller."""
        drawn = noise.permutation(len(self.slots), self.seed, epoch, self.stream).numpy()
        drawn = drawn[np.argsort(self.bucket[drawn], kind="stable")]            # bucket by bucket, each in random order
        first_slot, first_step = (np.cumsum(n) - n for n in (self.counts, -(-self.counts // self.size)))
        rank = np.arange(len(drawn)) - first_slot[self.bucket[drawn]]
        table = np.full((self.steps, self.size), -1)
        table[first_step[self.bucket[drawn]] + rank // self.size, rank % self.size] = self.slots[drawn]
        return table[noise.permutation(self.steps, self.seed, epoch, f"{self.stream} of steps").numpy()]
