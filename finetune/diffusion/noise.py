"""Randomness as a function of position.

Every number that a run draws comes from (seed, position, stream): the recipe's seed, the global position of the example
(or the number of the epoch or step), and a word that says what it is for. Nothing random is ever saved, a resumed run
draws what it would have drawn, and one process with batch 4 draws the same as four with batch 1. Drawn on the CPU by
numpy's Philox (Salmon et al. 2011), whose numbers do not depend on the processor: torch's own depend on its vector
instructions, and its seeds have 32 bits.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, position: int, stream: str) -> int:
    """A 128-bit key for that draw."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{position}/{stream}".encode(), digest_size=16).digest(), "little")


def generator(seed: int, position: int, stream: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=derive(seed, position, stream)))


def normal(shape: tuple[int, ...], seed: int, positions: list[int], stream: str) -> Tensor:
    """Standard normal numbers (B, *shape) float32, one independent draw for each position."""
    return torch.stack([torch.from_numpy(generator(seed, p, stream).standard_normal(shape, np.float32)) for p in positions])


def uniform(seed: int, position: int, stream: str) -> float:
    """One number in [0, 1), from the first 53 bits of the key."""
    return (derive(seed, position, stream) >> 75) * 2.0 ** -53


def uniforms(seed: int, positions: list[int], stream: str) -> Tensor:
    """(B,) float64 in [0, 1)."""
    return torch.tensor([uniform(seed, p, stream) for p in positions], dtype=torch.float64)


def permutation(n: int, seed: int, position: int, stream: str) -> Tensor:
    """(n,) int64, a random order."""
    return torch.from_numpy(generator(seed, position, stream).permutation(n))
