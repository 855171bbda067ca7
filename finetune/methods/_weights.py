"""Weights of the base that are trained themselves, beside what they were."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.artifact import Artifact
from finetune.errors import FinetuneError
from finetune.methods.base import restore


class Weights:
    """What they were lies on the CPU, so that the device holds no second copy of a model."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = {name: p.requires_grad_() for name, p in parameters.items()}
        self.base = stored(parameters)

    def artifact(self, kind: str, family: str, metadata: dict[str, str], also: dict[str, Tensor] = {}) -> Artifact:
        """What is trained, and `also`. Raises FinetuneError when not one weight has moved."""
        now = stored(self.parameters)
        if all(torch.equal(self.base[name], t) for name, t in now.items()):
            raise FinetuneError("training has changed nothing: nothing is written; raise train.learning_rate or "
                                "train.max_steps")
        return Artifact(kind, family, stored(also) | now, metadata)

    @contextmanager
    def at(self, strength: float):
        """Inside, each weight is base + strength · (trained − base); exactly the base's at 0. At 1 nothing is moved."""
        if strength == 1:
            yield
            return
        trained = stored(self.parameters)
        try:
            with torch.no_grad():
                for name, p in self.parameters.items():     # one by one: in float32 they are twice a model of bfloat16
                    p.copy_(torch.lerp(self.base[name].float(), trained[name].float(), strength))
            yield
        finally:
            restore(self.parameters, trained)


def stored(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; those of shapes without numbers stay where they are."""
    return {name: p.detach().clone() if p.is_meta else p.detach().to("cpu", copy=True).contiguous()
            for name, p in parameters.items()}
