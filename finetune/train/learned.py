"""The words that a run learns: those that captions name, and one for each value of a column."""

import re
from dataclasses import dataclass, field

from finetune.data import encode
from finetune.data.index import Index
from finetune.data.loader import Stream
from finetune.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.recipe.method import Token

MOST = 1000     # values of a column: more are texts rather than classes


@dataclass(frozen=True)
class Learned:
    """The tokens, and what they stand for in captions."""

    tokens: dict[str, Token] = field(default_factory=dict)              # each as if the recipe named it
    stands: dict[str, dict[str, str]] = field(default_factory=dict)     # column -> value -> token


def words(recipe: Recipe, index: Index) -> Learned:
    """The tokens that a recipe orders of these pictures. Raises FinetuneError for a column with none or too many."""
    found = Learned()
    methods = [method for method in recipe.method if method.kind == "embedding"]
    for name, token in (pair for method in methods for pair in method.tokens.items()):
        if not token.column:
            _add(found, name, token.init, token.vectors)
            continue
        if token.column in found.stands:
            raise FinetuneError(f"method.tokens: the column {token.column} is taken twice")
        values = _values(index, token.column)
        found.stands[token.column] = {value: f"{name}-{_plain(value)}" for value in values}
        for value, own in found.stands[token.column].items():
            _add(found, own, token.init or value, token.vectors)
    return found


def check_said(learned: Learned, stream: Stream, steps: int, family) -> None:
    """Raise FinetuneError for tokens that no caption names. Captions too many to be listed are drawn, as the run will."""
    if not learned.tokens:
        return
    captions = encode.every_caption([(stream.index, stream.captions)]) if stream.captions.finite else {
        stream.caption(example, position) for step in range(steps)
        for position, example in stream.positions(step, range(stream.order.size)).items()}
    said = {id for caption in captions for piece in family.pieces(caption)[0] for id in piece}
    if unsaid := [name for name, ids in family.learned.ids.items() if ids[0] not in said]:
        shown = ", ".join(unsaid[:5]) + (f" and {len(unsaid) - 5} more" if len(unsaid) > 5 else "")
        shown += " are" if len(unsaid) > 1 else " is"
        column = next((column for column, tokens in learned.stands.items() if unsaid[0] in tokens.values()), None)
        advice = f"name {{{column}}} in data.caption.template" if column else \
            "write it into data.caption.template or trigger"
        raise FinetuneError(f"method.tokens: {shown} in no caption\n    {advice}")


def _add(found: Learned, name: str, init: str, vectors: int) -> None:
    if name in found.tokens:
        raise FinetuneError(f"method.tokens: {name} stands for two things; rename one of them")
    found.tokens[name] = Token(init=init, vectors=vectors)


def _values(index: Index, column: str) -> list[str]:
    rows = [index.columns(i) for i in range(len(index))]
    values = sorted({row[column].strip() for row in rows if row.get(column, "").strip()})
    if not values:
        known = ", ".join(sorted({name for row in rows for name in row})) or "none"
        raise FinetuneError(f"method.tokens: no picture has a column {column!r}; columns: {known}")
    if len(values) > MOST:
        raise FinetuneError(f"method.tokens: the column {column!r} has {len(values):,} values; a token can be learned for "
                            f"each of up to {MOST:,}")
    return values


def _plain(value: str) -> str:
    """A value as a part of a token's name, which is the name of a file."""
    return re.sub(r"[^\w]+", "-", value.lower()).strip("-")
