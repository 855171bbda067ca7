"""A control branch: a picture beside the prompt, such as boxes or edges, that says where what is to be (ControlNet)."""

from contextlib import contextmanager
from dataclasses import dataclass
from math import log2
from typing import ClassVar

import torch
from torch import nn

from finetune.artifact import Artifact
from finetune.diffusion import noise
from finetune.families import _control
from finetune.methods import base
from finetune.methods._weights import Weights, stored
from finetune.recipe.method import Control as Words


@dataclass
class Control:
    """The denoiser rests; what its branch learns is of use to any model with such a denoiser."""

    words: Words
    seed: int
    trains: tuple[str, ...] = ("control",)

    objective: ClassVar = "denoise"
    kind: ClassVar = "control"
    groups, after_step = base.groups, base.after_step

    def install(self, family) -> None:
        unet = family.parts["denoiser"]
        with torch.random.fork_rng():
            torch.manual_seed(noise.derive(self.seed, 0, "control") % 2**63)
            self.branch = _control.branch(unet, _control.WIDTHS[:1 + int(log2(family.stride))]).to(unet.device)
        family.parts["control"] = self.branch
        self.family = family.spec.name
        self.weights = Weights({f"control.{name}": p for name, p in self.branch.named_parameters()})

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.weights.parameters

    def export(self, metadata: dict[str, str]) -> dict[str, Artifact]:
        return {"": self.weights.artifact(self.kind, self.family, metadata)}

    @contextmanager
    def at(self, strength: float):
        trained = stored(self.parameters())
        try:
            _control.scale(self.branch, strength)
            yield
        finally:
            base.restore(self.parameters(), trained)


build = Control
