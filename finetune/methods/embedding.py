"""Textual inversion: learned words in front of a model that stays as it is (Gal et al. 2022)."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from finetune import tokens as learned
from finetune.artifact import Artifact
from finetune.methods import base
from finetune.recipe.method import Embedding as Words


@dataclass
class Embedding:
    """Each token begins as words that the model knows; only its rows have gradients and a state in the optimizer."""

    words: Words
    seed: int                       # of no use: nothing of it is drawn
    trains: tuple[str, ...] = ("text",)

    objective: ClassVar = "denoise"
    kind: ClassVar = "embedding"
    groups, after_step = base.groups, base.after_step

    def install(self, family) -> None:
        self.family, self.trains = family.spec.name, tuple(learned.text_parts(family))
        tables = {part: family.parts[part].get_input_embeddings() for part in self.trains}
        rows = {name: {part: learned.initial(family.tokenizers[part], table, token.init, token.vectors)
                       for part, table in tables.items()} for name, token in self.words.tokens.items()}
        found = learned.extend(family, rows, "method.tokens: ")
        self.tables, first = found.tables, len(next(iter(tables.values())).weight)
        self.places = {name: slice(ids.start - first, ids.stop - first) for name, ids in found.ids.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"embedding.{part}": table.learned for part, table in self.tables.items()}

    def export(self, metadata: dict[str, str]) -> dict[str, Artifact]:
        """A file for each token, for most tools take the file's name for the token's."""
        rows = {part: table.learned.detach().cpu() for part, table in self.tables.items()}
        return {name: Artifact(self.kind, self.family, {f"{part}.embedding": own[place].clone() for part, own in rows.items()},
                               metadata | {"ss_output_name": name, "modelspec.title": name})
                for name, place in self.places.items()}

    @contextmanager
    def at(self, strength: float):
        """Inside, the tokens are so far on the way from the words that they began as."""
        before = [table.strength for table in self.tables.values()]
        for table in self.tables.values():
            table.strength = strength
        try:
            yield
        finally:
            for table, own in zip(self.tables.values(), before):
                table.strength = own


build = Embedding
