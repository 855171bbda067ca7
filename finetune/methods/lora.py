"""LoRA: a low-rank difference B·A on the weights of the denoiser (Hu et al. 2021), and its relatives."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune.artifact import Artifact, fold_alpha, modules, published
from finetune.change import change, core
from finetune.diffusion import noise
from finetune.errors import FinetuneError
from finetune.families.base import CLIP_TARGETS
from finetune.methods._targets import Part, override, resolve
from finetune.methods._variants import VARIANTS, tensor
from finetune.methods.base import restore
from finetune.recipe.method import Lora as Words


@dataclass
class Lora:
    """At the start the change is zero, so that training begins at the base; float32 is trained, whatever the base is."""

    words: Words
    seed: int
    trains: tuple[str, ...] = ("denoiser",)
    strength: float = 1.0           # that it counts with now
    layers: dict[str, nn.Module] = field(default_factory=dict)      # "<part>.<published path>" -> the adapted layer
    scales: dict[str, Tensor] = field(default_factory=dict)         # the same -> its alpha, as a file has it

    objective: ClassVar = "denoise"

    @property
    def kind(self) -> str:
        return VARIANTS[self.words.variant].kind

    def install(self, family) -> None:
        from diffusers.training_utils import cast_training_params

        self.family = family.spec.name
        encoders = family.spec.encoders if self.words.text else ()
        self.trains = ("denoiser", *encoders)
        planned = {part: self.plan(family, part) for part in self.trains}
        with torch.random.fork_rng():
            torch.manual_seed(noise.derive(self.seed, 0, "lora init") % 2**63)
            for part, layers in planned.items():
                module = family.parts[part]
                VARIANTS[self.words.variant].attach(module, layers, self)
                cast_training_params(module, torch.float32)     # peft gives an adapter the dtype of its base,
                module.train(module.training)                   # and has it train while the base rests
        for part, layers in planned.items():
            for path, (_, alpha) in layers.items():
                stem = f"{part}.{published(path)}"
                self.layers[stem], self.scales[stem] = family.parts[part].get_submodule(path), torch.tensor(float(alpha))

    def plan(self, family, part: str) -> dict[str, tuple[int, float]]:
        """{path: (rank, alpha)} of a part's layers that get an adapter. Raises FinetuneError for words that name none."""
        words = self.words
        own, groups, key = ((words, family.spec.targets, "method") if part == "denoiser" else
                            (words.text, CLIP_TARGETS, "method.text"))
        where = Part(f"{family.spec.name}.{part}", family.parts[part], groups)
        paths = resolve(own.targets, where, f"{key}.targets")
        if not words.rank:       # LoKr and OFT have neither rank nor scale
            return {path: (1, 1.0) for path in paths}
        ranks = override(own.rank or words.rank, getattr(own, "ranks", {}), paths, where, f"{key}.ranks")
        alphas = override(own.alpha, getattr(own, "alphas", {}), paths, where, f"{key}.alphas")
        # rsLoRA (Kalajdzievski 2023) scales by alpha / √rank: a LoRA whose alpha is larger by √rank.
        larger = {path: rank ** 0.5 if self.words.variant == "rslora" else 1.0 for path, rank in ranks.items()}
        return {path: (rank, (alphas[path] or rank) * larger[path]) for path, rank in ranks.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{stem}.{role}": tensor(layer, role)
                for stem, layer in self.layers.items() for role in VARIANTS[self.words.variant].roles}

    def groups(self, learning_rate: float) -> list[dict]:
        """LoRA+ (Hayou et al. 2024): B has a learning rate of its own, and so may the text encoders."""
        rates: dict[float, list[nn.Parameter]] = {}
        for name, p in self.parameters().items():
            own = None if name.startswith("denoiser.") else self.words.text.learning_rate
            rate = own or self.words.learning_rate or learning_rate
            if self.words.lora_plus and name.endswith(".lora_B"):
                rate *= self.words.lora_plus
            rates.setdefault(rate, []).append(p)
        return [{"params": params, "lr": rate} for rate, params in rates.items()]

    def export(self, metadata: dict[str, str]) -> dict[str, Artifact]:
        """The files of the variant; of OFT the difference that it makes, which six tools read instead of two."""
        tensors = {name: p.detach().cpu().clone() for name, p in self.parameters().items()}
        if self.words.variant == "oft":
            tensors = {f"{stem}.diff": change({"oft_blocks": tensor(layer, "oft_blocks").detach()}, layer.weight).cpu()
                       for stem, layer in self.layers.items()}
        else:
            tensors |= {f"{stem}.alpha": alpha for stem, alpha in self.scales.items()}
        return {"": Artifact(self.kind, self.family, fold_alpha(tensors), metadata)}

    def start_from(self, artifact: Artifact) -> None:
        """Go on from an adapter; a scale other than the recipe's goes into the tensors. Raises FinetuneError unless layers
        and shapes are the recipe's."""
        mine, zero = self.parameters(), VARIANTS[self.words.variant].zero
        theirs = {name: t.float() for name, t in artifact.tensors.items() if not name.endswith(".alpha")}
        problems = [(theirs.keys() - mine, "of the file are not among what the recipe trains"),
                    (mine.keys() - theirs, "that the recipe trains are not in the file"),
                    ({name for name in mine.keys() & theirs.keys() if mine[name].shape != theirs[name].shape},
                     "have another shape in the file: ranks and base have to be the same")]
        if said := [f"{len(names)} tensors {why}: {', '.join(sorted(names)[:3])}" for names, why in problems if names]:
            raise FinetuneError(f"method.start_from: this {artifact.kind} does not fit the recipe's {self.words.variant}\n    "
                                + "\n    ".join(said))
        for (part, path), module in modules(artifact.tensors).items():
            if zero and "alpha" in module:
                stem = f"{part}.{path}"
                theirs[f"{stem}.{zero}"] = theirs[f"{stem}.{zero}"] * (module["alpha"] / self.scales[stem])
        restore(mine, theirs)

    @torch.no_grad()
    def after_step(self) -> None:
        """Scale down each change whose norm is above `max_norm`, all factors alike, as sd-scripts' scale_weight_norms."""
        if not self.words.max_norm:
            return
        roles = VARIANTS[self.words.variant].product
        for stem, layer in self.layers.items():
            factors = {role: tensor(layer, role) for role in roles}
            norm = core(factors | {"alpha": self.scales[stem]}).norm()
            for p in factors.values():
                p.mul_((self.words.max_norm / norm).clamp(max=1) ** (1 / len(roles)))

    @contextmanager
    def at(self, strength: float):
        self.strength = strength
        try:
            yield
        finally:
            self.strength = 1.0


build = Lora
