"""Full fine-tuning: the weights of the denoiser themselves, or a pattern of them (Ruiz et al. 2023; Custom Diffusion, Kumari
et al. 2023, trains the keys and values of cross-attention)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from finetune.artifact import Artifact, published
from finetune.errors import FinetuneError
from finetune.families._altered import unused
from finetune.lowrank import Cut, differences, error, packed
from finetune.methods import base
from finetune.methods._targets import ADAPTED, Part, resolve
from finetune.methods._weights import Weights
from finetune.recipe.method import Full as Words

ENCODER = ("encoder.layers.", "final_layer_norm.")      # what is trained of a CLIP: its tokens and places stay


@dataclass
class Full:
    """The weights are trained in the format that the base is loaded in: see optim/rounding.py for bfloat16."""

    words: Words
    seed: int
    trains: tuple[str, ...] = ("denoiser",)

    objective: ClassVar = "denoise"
    kind: ClassVar = "full"
    after_step = base.after_step

    def install(self, family) -> None:
        self.family = family.spec.name
        self.trains = ("denoiser", *(family.spec.encoders if self.words.text else ()))
        if any(p.dtype == torch.float16 for part in self.trains for p in family.parts[part].parameters()):
            raise FinetuneError("base.dtype: float16 is too coarse for weights that are trained; use float32, or bfloat16 "
                                "whose steps are rounded at random")
        self.weights = Weights({f"{part}.{published(name)}": p for part in self.trains
                                for name, p in self.chosen(family, part).items()})
        # The layers that a LoRA can be extracted of.
        self.layers = [f"{part}.{published(path)}" for part in self.trains
                       for path, m in family.parts[part].named_modules() if isinstance(m, ADAPTED)]

    def chosen(self, family, part: str) -> dict[str, nn.Parameter]:
        """The parameters of a part that are trained. Raises FinetuneError for words that name none."""
        module = family.parts[part]
        if part != "denoiser":
            idle = unused(module)
            return {name: p for name, p in module.named_parameters()
                    if name.removeprefix("text_model.").startswith(ENCODER) and not name.startswith(idle)}
        if self.words.targets is None:
            return dict(module.named_parameters())
        where = Part(f"{family.spec.name}.denoiser", module, family.spec.targets)
        paths = resolve(self.words.targets, where, "method.targets")
        return {f"{path}.{name}": p for path in paths for name, p in module.get_submodule(path).named_parameters()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.weights.parameters

    def groups(self, learning_rate: float) -> list[dict]:
        rates: dict[float, list[nn.Parameter]] = {}
        for name, p in self.parameters().items():
            own = None if name.startswith("denoiser.") else self.words.text.learning_rate
            rates.setdefault(own or self.words.learning_rate or learning_rate, []).append(p)
        return [{"params": params, "lr": rate} for rate, params in rates.items()]

    def export(self, metadata: dict[str, str]) -> dict[str, Artifact]:
        """The weights, and with `extract_rank` a LoRA beside them that is nearly the same."""
        found = {"": self.weights.artifact(self.kind, self.family, metadata)}
        if rank := self.words.extract_rank:
            pairs = ((name, self.weights.base[name], t) for name, t in found[""].tensors.items())
            products, other = differences(pairs, self.layers.__contains__, Cut(rank))
            lora, products = packed(products, torch.float32)
            name, lost = f"{metadata.get('ss_output_name', self.kind)}.lora", error(products.values(), other)
            found[name] = Artifact("lora", self.family, lora, metadata | {
                "ss_output_name": name, "modelspec.title": name,
                "finetune.extracted": f"rank {rank}; {lost:.1%} of the change is left out"})
        return found

    def at(self, strength: float):
        return self.weights.at(strength)


build = Full
