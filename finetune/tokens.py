"""Learned tokens: new rows beside a text encoder's table, and their names in its tokenizer.

In textual inversion (Gal et al. 2022) a new word stands for one vector or for several. The names are those of diffusers, so
that its pipelines know them: a token of three vectors is `dog dog_1 dog_2` to the tokenizer, and a prompt says `dog`.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import FinetuneError, refuse

NAME = re.compile(r"(?!_)[^\W\s][\w-]{0,99}")
MOST_BYTES = 200        # a file system takes 255, with what is put around the name
RULE = "a token is made of small letters, digits, - and _, of up to 100 (200 bytes), and is the name of its file"
Rows = Mapping[str, Mapping[str, Tensor]]       # token -> part -> (vectors, width)


@dataclass(frozen=True)
class Learned:
    """What a family knows of its learned tokens. They have the same ids in all of its tokenizers that have any."""

    tokenizers: dict[str, object]   # part -> its tokenizer without them
    ids: dict[str, range]           # token -> its ids
    tables: dict[str, "Extended"]   # part -> the table that has their rows

    def spelled(self, ids: list[int]) -> list[int]:
        """The ids with all vectors of each learned token, where the tokenizer finds the first."""
        whole = {own[0]: own for own in self.ids.values()}
        return [each for id in ids for each in whole.get(id, (id,))]


class Extended(nn.Embedding):
    """A table with learned rows behind it, which are float32 whatever the table is.

    They are looked up apart: behind the table in one tensor, a gradient of 49 408 rows would be made to learn one."""

    def __init__(self, table: nn.Embedding, rows: Tensor):
        super().__init__(1, 1, device="meta")
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.weight = table.weight
        self.learned = nn.Parameter(rows.to(table.weight.device, torch.float32))
        self.register_buffer("initial", self.learned.detach().clone(), persistent=False)
        self.strength = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        beyond = ids - len(self.weight)
        rows = self.learned if self.strength == 1 else torch.lerp(self.initial, self.learned, self.strength)
        new, known = F.embedding(beyond.clamp(min=0), rows), super().forward(ids.clamp(max=len(self.weight) - 1))
        return torch.where((beyond >= 0)[..., None], new.to(known.dtype), known)


def text_parts(family) -> list[str]:
    """The text encoders that learn a token: those with the first one's vocabulary, that is, all CLIPs and no T5."""
    size = len(family.tokenizers["text"])
    return [part for part, tokenizer in family.tokenizers.items() if len(tokenizer) == size]


def initial(tokenizer, table: nn.Embedding, words: str, vectors: int) -> Tensor:
    """Rows that mean these words, (vectors, width) float32: one is the mean of theirs, several take theirs in turn."""
    ids = tokenizer(words, add_special_tokens=False).input_ids
    if not ids:
        raise FinetuneError(f"method.tokens: init {words!r} is nothing to the tokenizer")
    rows = table.weight.detach()[ids].float()
    return rows.mean(0, keepdim=True) if vectors == 1 else rows[torch.arange(vectors) % len(rows)]


def check(tokenizer, vectors: Mapping[str, int], field: str) -> None:
    """Raise FinetuneError, about this field of the recipe, for names that the tokenizer or diffusers would mistake."""
    known = tokenizer.get_vocab()
    problems = [f"{name!r}: {RULE}" for name in vectors
                if not (NAME.fullmatch(name) and name == name.lower() and len(name.encode()) <= MOST_BYTES)]
    problems += [f"{name!r} is in the tokenizer's own vocabulary, so diffusers refuses it; add something, as in {name}-1"
                 for name in vectors if name in known]
    problems += [f"{long!r} holds {short!r}, and diffusers would take one for the other; rename one of them"
                 for long in vectors for short, count in vectors.items() if short != long and short in long
                 and (count > 1 or re.fullmatch(rf"{re.escape(short)}_\d+", long))]
    refuse([field + problem for problem in problems])


def extend(family, tokens: Rows, field: str = "") -> Learned:
    """Give a family these tokens. Raises FinetuneError for names and widths that do not fit."""
    from tokenizers import AddedToken

    assert family.learned is None, "the family has learned tokens already"
    vectors = {name: len(next(iter(parts.values()))) for name, parts in tokens.items()}
    before = {part: family.tokenizers[part] for part in text_parts(family)}
    check(before["text"], vectors, field)
    first, ids, tables = len(before["text"]), {}, {}
    for name, count in vectors.items():
        ids[name] = range(first, first := first + count)
    words = [word for name, count in vectors.items() for word in (name, *(f"{name}_{n}" for n in range(1, count)))]
    for part, tokenizer in before.items():
        family.tokenizers[part] = copy.deepcopy(tokenizer)
        family.tokenizers[part].add_tokens([AddedToken(word, single_word=True) for word in words])
        if part in family.parts:
            table = family.parts[part].get_input_embeddings()
            tables[part] = Extended(table, torch.cat([parts[part].to(table.weight.device) for parts in tokens.values()]))
            family.parts[part].set_input_embeddings(tables[part])
    family.learned = Learned(before, ids, tables)
    return family.learned


@contextmanager
def added(family, tokens: Rows) -> Iterator[None]:
    """Inside, prompts may name these tokens; afterwards the family is what it was."""
    if not tokens:
        yield
        return
    tables = {part: family.parts[part].get_input_embeddings() for part in text_parts(family)}
    learned = extend(family, tokens)
    try:
        yield
    finally:
        _put(family, None, learned.tokenizers, tables)


@contextmanager
def hidden(family) -> Iterator[None]:
    """Inside, the family is what it was before it got tokens, as a folder of it has to be."""
    learned, own = family.learned, dict(family.tokenizers)
    if learned is None:
        yield
        return
    _put(family, None, learned.tokenizers,
         {part: nn.Embedding.from_pretrained(table.weight.detach()) for part, table in learned.tables.items()})
    try:
        yield
    finally:
        _put(family, learned, own, learned.tables)


def _put(family, learned: Learned | None, tokenizers: dict[str, object], tables: Mapping[str, nn.Embedding]) -> None:
    family.learned = learned
    family.tokenizers |= tokenizers
    for part, table in tables.items():
        family.parts[part].set_input_embeddings(table)


def misfits(family_parts: Mapping[str, nn.Module], rows: Mapping[str, Tensor]) -> list[str]:
    """The parts whose vectors these encoders cannot take."""
    wanted = {part: module.get_input_embeddings().weight.shape[1] for part, module in family_parts.items()
              if part in ("text", "text_2")}
    found = {part: t.shape[-1] for part, t in rows.items()}
    return [f"{part}: vectors of {found.get(part, 'no')} numbers, but the base has {wanted.get(part, 'no such encoder')}"
            for part in sorted(wanted.keys() | found.keys()) if wanted.get(part) != found.get(part)]
