"""What an objective is: the loss of a batch, and nothing else."""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from finetune.batch import Batch, Losses


class Objective(Protocol):
    """A module of this folder has `build(**fields of the recipe) -> Objective`."""

    networks: Mapping[str, nn.Module]   # what learns beside the method: resumed with it, averaged and exported never

    def __call__(self, family, batch: Batch, seed: int) -> Losses:
        """The batch is on the family's device; `seed` with the batch's positions gives every random number."""
