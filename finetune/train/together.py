"""The methods of a run as one: each trains at its own rate and to its own end, and is exported by itself."""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from finetune import registry
from finetune.artifact import Artifact
from finetune.errors import FinetuneError
from finetune.methods.base import restore
from finetune.recipe import Recipe
from finetune.recipe.method import Token
from finetune.train.recompute import recompute


@dataclass(frozen=True)
class Together:
    methods: tuple                      # see methods/base.py

    def __post_init__(self):
        kinds = {method.objective for method in self.methods}
        if len(kinds) > 1:
            raise FinetuneError(f"method: {' and '.join(sorted(kinds))} are different objectives; train them in runs of their "
                                "own")
        # Learned tokens have files, and places beside a text encoder, of their own; any other two would want the same.
        if len(others := [method.kind for method in self.methods if method.kind != "embedding"]) > 1:
            raise FinetuneError(f"method: {' and '.join(others)} would both be the run's file; train them in runs of their "
                                "own")

    @property
    def objective(self) -> str:
        return self.methods[0].objective

    @property
    def trains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part for method in self.methods for part in method.trains))

    def install(self, family) -> None:
        for method in sorted(self.methods, key=lambda method: method.kind == "embedding"):      # peft freezes what it meets
            method.install(family)

    def compute_twice(self, family, how: bool | str) -> None:
        """Keep no activations of the networks that gradients go through, or few: see `recompute`."""
        for part in {"denoiser" if self.objective == "denoise" else "vae"} | {*self.trains} & {"control"}:
            recompute(family.parts[part], how)

    def groups(self, learning_rate: float, steps: int) -> list[dict]:
        """Optimizer groups: `params`, `peak_lr`, and `until`, the step after which they rest."""
        return [group | {"peak_lr": group["lr"], "until": until(method, steps)}
                for method in self.methods for group in method.groups(learning_rate)]

    def parted(self, step: int, steps: int) -> tuple["Together", "Together"]:
        """Those that learn in this step, and those that rest."""
        return (Together(tuple(method for method in self.methods if step < until(method, steps))),
                Together(tuple(method for method in self.methods if step >= until(method, steps))))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for method in self.methods for name, p in method.parameters().items()}

    def after_step(self) -> None:
        for method in self.methods:
            method.after_step()

    def export(self, metadata: dict[str, str]) -> dict[str, Artifact]:
        return {name: artifact for method in self.methods for name, artifact in method.export(metadata).items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        restore(self.parameters(), tensors)

    @contextmanager
    def at(self, strength: float):
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.at(strength))
            yield


def until(method, steps: int) -> int:
    """The step in which a method begins to rest."""
    return round(method.words.until * steps)


def built(recipe: Recipe, tokens: Mapping[str, Token]) -> Together:
    """The methods of a recipe; the one that learns words learns these."""
    return Together(tuple(registry.find("methods", words.kind).build(
        words.model_copy(update={"tokens": tokens} if words.kind == "embedding" else None), recipe.train.seed)
        for words in recipe.method))
