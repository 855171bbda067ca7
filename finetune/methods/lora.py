"""LoRA: a low-rank difference B·A on the weights of the denoiser (Hu et al. 2021), injected by peft."""

import difflib
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from finetune.artifact import Artifact
from finetune.diffusion import noise
from finetune.errors import FinetuneError

ADAPTED = (nn.Linear, nn.Conv2d)


class Lora:
    """B is zero at the start, so that training begins at the base; A and B are float32 whatever the base is."""

    objective = "denoise"
    trains = ("denoiser",)

    def __init__(self, rank: int, alpha: float, dropout: float, targets: list[str], learning_rate: float | None, seed: int):
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets
        self.learning_rate, self.seed = learning_rate, seed

    def install(self, family) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.family, self.denoiser = family.spec.name, family.parts["denoiser"]
        self.paths = resolve(self.targets, self.denoiser, family.spec)
        with torch.random.fork_rng():
            torch.manual_seed(noise.derive(self.seed, 0, "lora init") % 2**63)
            self.denoiser.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout,
                                                 target_modules=self.paths))
        cast_training_params(self.denoiser, torch.float32)      # peft gives an adapter the dtype of its base

    def parameters(self) -> dict[str, nn.Parameter]:
        modules = {path: self.denoiser.get_submodule(path) for path in self.paths}
        return {f"denoiser.{path}.{side}": getattr(module, side)["default"].weight
                for path, module in modules.items() for side in ("lora_A", "lora_B")}

    def groups(self) -> list[dict]:
        group = {"params": list(self.parameters().values())}
        return [group | ({"lr": self.learning_rate} if self.learning_rate else {})]

    def export(self, metadata: dict[str, str]) -> Artifact:
        tensors = {name: p.detach().cpu().clone() for name, p in self.parameters().items()}
        tensors |= {f"denoiser.{path}.alpha": torch.tensor(float(self.alpha)) for path in self.paths}
        return Artifact("lora", self.family, tensors, metadata)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        mine = self.parameters()
        if unlike := {n for n in mine.keys() | tensors.keys()
                      if n not in mine or n not in tensors or mine[n].shape != tensors[n].shape}:
            raise FinetuneError(f"{len(unlike)} tensors do not fit this LoRA, for example {sorted(unlike)[0]}")
        for name, p in mine.items():
            p.copy_(tensors[name])

    @contextmanager
    def at(self, strength: float):
        """Inside, the difference is multiplied by `strength`."""
        modules = [self.denoiser.get_submodule(path) for path in self.paths]
        try:
            for module in modules:
                module.set_scale("default", strength)
            yield
        finally:
            for module in modules:
                module.set_scale("default", 1.0)


def resolve(targets: list[str], module: nn.Module, spec) -> list[str]:
    """The paths of the modules that the targets name, sorted. A target is a group of the family, or a pattern with `*`
    that has to fit a module's whole path or the end of it. Raises FinetuneError for one that names nothing."""
    paths = [path for path, m in module.named_modules() if isinstance(m, ADAPTED)]
    others = {path for path, m in module.named_modules() if path} - set(paths)

    def fitting(pattern: str, among) -> set[str]:
        return {path for path in among if fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")}

    chosen: set[str] = set()
    for target in targets:
        found = [fitting(pattern, paths) for pattern in spec.targets.get(target, (target,))]
        if not all(found):
            if unfit := fitting(target, others):
                what = type(module.get_submodule(sorted(unfit)[0])).__name__
                why = f"names {len(unfit)} modules ({what}), none of them a Linear or Conv2d; add `.*` for what is inside"
            else:
                last = {name: sum(p == name or p.endswith(f".{name}") for p in paths)
                        for p in paths for name in [p.rsplit(".", 1)[-1]] if not name.isdigit()}
                near = difflib.get_close_matches(target, [*spec.targets, *last], 1, 0.4)
                why = f"matches no module of {spec.name}.denoiser"
                if near:
                    why += f"\n    nearest: {near[0]!r}" + (f" ({last[near[0]]} modules)" if near[0] in last else "")
                why += f"\n    groups: {', '.join(spec.targets)}"
            raise FinetuneError(f"method.targets: {target!r} {why}")
        chosen.update(*found)
    return sorted(chosen)


def build(**fields) -> Lora:
    return Lora(**fields)
