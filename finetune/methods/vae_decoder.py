"""The decoder of a VAE, tuned to draw sharper pictures from the same latents (as Stability's sd-vae-ft-mse)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from finetune.artifact import Artifact
from finetune.methods import base
from finetune.methods._weights import Weights
from finetune.recipe.method import VaeDecoder as Words

DECODER = ("decoder.", "post_quant_conv.")


@dataclass
class VaeDecoder:
    """The encoder rests unless it is asked for: the latents, and every denoiser that knows them, stay valid."""

    words: Words
    seed: int
    trains: tuple[str, ...] = ("vae",)

    objective: ClassVar = "decode"
    kind: ClassVar = "vae"
    groups, after_step = base.groups, base.after_step

    def install(self, family) -> None:
        self.family, self.vae = family.spec.name, family.parts["vae"]
        self.weights = Weights({f"vae.{name}": p for name, p in self.vae.named_parameters()
                                if self.words.encoder or name.startswith(DECODER)})

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.weights.parameters

    def export(self, metadata: dict[str, str]) -> dict[str, Artifact]:
        """The whole VAE, for most tools take no half of one."""
        whole = {f"vae.{name}": p for name, p in self.vae.named_parameters()}
        return {"": self.weights.artifact(self.kind, self.family, metadata, whole)}

    def at(self, strength: float):
        return self.weights.at(strength)


build = VaeDecoder
