"""What a method is: it says what is trainable and what file it becomes; it knows no loss, optimizer or disk."""

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from finetune.artifact import Artifact
from finetune.errors import FinetuneError


class Method(Protocol):
    """A module of this folder has `build(words, seed) -> Method`; `words` are the recipe's of that kind (recipe/method.py)."""

    objective: ClassVar[Literal["denoise", "decode"]]
    kind: str                           # of the artifact that it exports
    trains: tuple[str, ...]             # the family's parts that hold trainable parameters, once it is installed

    def install(self, family) -> None:
        """Add or unfreeze what is trained. Raises FinetuneError when the family has no such thing."""

    def groups(self, learning_rate: float) -> list[dict]:
        """Optimizer groups: `params`, and `lr`, which is the run's where the method has none of its own."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, under the artifact's names."""

    def after_step(self) -> None:
        """What has to hold after each step of the optimizer, such as a limit on norms."""

    def export(self, metadata: dict[str, str]) -> dict[str, Artifact]:
        """Its files: the name of each, "" for the run's own, and what is in it."""

    def start_from(self, artifact: Artifact) -> None:
        """Begin where the artifact is, not at the base: of methods that have this word. Raises FinetuneError when it does
        not fit."""

    def at(self, strength: float):
        """A context in which what is trained counts `strength` times, as a user of the file would have it; at 0 the
        family is the untouched base."""


def groups(method, learning_rate: float) -> list[dict]:
    """Of a method that trains all at one rate."""
    return [{"params": list(method.parameters().values()), "lr": method.words.learning_rate or learning_rate}]


def after_step(method) -> None:
    """Of a method in which nothing has to hold."""


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Put a method's `parameters()` back, bit for bit. Raises FinetuneError, with nothing changed, when names or shapes do
    not fit."""
    if unlike := {name for name in parameters.keys() | tensors.keys()
                  if name not in parameters or name not in tensors or parameters[name].shape != tensors[name].shape}:
        raise FinetuneError(f"{len(unlike)} tensors do not fit what is trained, for example {sorted(unlike)[0]}")
    for name, p in parameters.items():
        p.copy_(tensors[name])
