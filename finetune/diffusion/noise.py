"""Randomness as a function of position.

Every number that a run draws comes from (seed, position, stream): the recipe's seed, the global position of the example
(or the number of the epoch or step), and a word that says what it is for. Nothing random is ever saved, a resumed run
draws what it would have drawn, and one process with batch 4 draws the same as four with batch 1. Drawn on the CPU, so
that every device trains on the same numbers.
"""

import hashlib

import torch
from torch import Tensor


def derive(seed: int, position: int, stream: str) -> int:
    """A 63-bit seed for that draw."""
    digest = hashlib.blake2b(f"{seed}/{position}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, position: int, stream: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, position, stream))


def normal(shape: tuple[int, ...], seed: int, positions: list[int], stream: str) -> Tensor:
    """Standard normal numbers (B, *shape) float32, one independent draw for each position."""
    return torch.stack([torch.randn(shape, generator=generator(seed, p, stream)) for p in positions])


def uniform(seed: int, position: int, stream: str) -> float:
    """One number in [0, 1), from 53 bits of the derived seed."""
    return (derive(seed, position, stream) >> 10) * 2.0 ** -53


def uniforms(seed: int, positions: list[int], stream: str) -> Tensor:
    """(B,) float64 in [0, 1)."""
    return torch.tensor([uniform(seed, p, stream) for p in positions], dtype=torch.float64)


def permutation(n: int, seed: int, position: int, stream: str) -> Tensor:
    """(n,) int64, a random order."""
    return torch.randperm(n, generator=generator(seed, position, stream))
