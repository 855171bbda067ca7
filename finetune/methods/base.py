"""What a method is: it says what is trainable and what file it becomes; it knows no loss, optimizer or disk."""

from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from finetune.artifact import Artifact


class Method(Protocol):
    """A module of this folder has `build(seed=…, **fields of the recipe) -> Method`."""

    objective: ClassVar[Literal["denoise", "decode"]]
    trains: tuple[str, ...]             # the family's parts that hold trainable parameters

    def install(self, family) -> None:
        """Add or unfreeze what is trained. Raises FinetuneError when the family has no such thing."""

    def groups(self) -> list[dict]:
        """Optimizer groups: `params`, and `lr` where the method has its own."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, under the artifact's names."""

    def export(self, metadata: dict[str, str]) -> Artifact: ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put `parameters()` back, bit for bit. Raises FinetuneError when names or shapes do not fit."""

    def at(self, strength: float):
        """A context in which what is trained counts `strength` times, as a user of the file would have it; at 0 the
        family is the untouched base."""
