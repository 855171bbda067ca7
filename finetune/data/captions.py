"""Captions as pure functions of an example's columns, the seed and the position.

The order: one of the choices is drawn, its columns are filled in, wildcards are drawn, tags are ordered and dropped, the
trigger is put first, prefix and suffix around it all. Each draw has a stream of its own, so turning one on leaves the
others as they were.
"""

import re
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from string import Formatter

from finetune.diffusion import noise
from finetune.errors import FinetuneError
from finetune.recipe.data import Tags

# `{a|b}` with nothing that is still to be drawn inside: a `{name}` without alternatives is a word like any other.
ALTERNATIVES = re.compile(r"\{((?:[^{}|]|\{[^{}|]*\})*\|(?:[^{}]|\{[^{}|]*\})*)\}")

DEEPEST = 20        # braces in braces


@dataclass(frozen=True)
class Captions:
    """How captions are made. Raises FinetuneError for a template that is not well formed."""

    choices: tuple[tuple[str, float], ...]      # (template, weight), of which one is drawn
    trigger: str | None = None                  # stands first in a caption that does not have it
    prefix: str = ""
    suffix: str = ""
    tags: Tags | None = None
    wildcards: bool = False                     # `{a|b}`, in templates and columns, is one of the two
    dropout: float = 0.0                        # share of draws whose caption is empty, for classifier-free guidance
    stands: Mapping[str, Mapping[str, str]] = field(default_factory=dict)      # column -> value -> the word for it

    def __post_init__(self):
        self.columns()

    def columns(self) -> list[str]:
        """The columns that the templates name."""
        return sorted({name for template, _ in self.choices for name in fields(template, self.wildcards)})

    def missing(self, columns: Mapping[str, str]) -> list[str]:
        """The columns that an example lacks for the first choice; none when any choice can be made of it."""
        return [] if self._possible(columns) else self._lacking(self.choices[0][0], columns)

    def caption(self, columns: Mapping[str, str], seed: int, position: int) -> str:
        """The caption at a position. The choices that lack columns leave their share to the others."""
        if noise.uniform(seed, position, "caption dropout") < self.dropout:
            return ""
        possible = self._possible(columns)
        assert possible, f"no caption without {self.missing(columns)}"
        ends = list(accumulate(weight for _, weight in possible))
        drawn = bisect(ends, noise.uniform(seed, position, "caption choice") * ends[-1], hi=len(ends) - 1)
        return self._made(possible[drawn][0], columns, seed, position)

    @property
    def finite(self) -> bool:
        """Whether `every` can list the captions."""
        return not (self.wildcards or (self.tags and (self.tags.shuffle or self.tags.dropout)))

    def every(self, columns: Mapping[str, str]) -> list[str] | None:
        """All captions that an example can get; None when they are too many to list."""
        if not self.finite:
            return None
        made = [self._made(template, columns, 0, 0) for template, _ in self._possible(columns)]    # nothing is drawn
        return list(dict.fromkeys(made + [""] * (self.dropout > 0)))

    def _possible(self, columns: Mapping[str, str]) -> list[tuple[str, float]]:
        return [(template, weight) for template, weight in self.choices if not self._lacking(template, columns)]

    def _lacking(self, template: str, columns: Mapping[str, str]) -> list[str]:
        return [name for name in dict.fromkeys(fields(template, self.wildcards)) if not columns.get(name, "").strip()]

    def _made(self, template: str, columns: Mapping[str, str], seed: int, position: int) -> str:
        columns = {name: self.stands.get(name, {}).get(value.strip(), value) for name, value in columns.items()}
        if self.wildcards:
            # The template's own and each column's are drawn apart: a brace of a column never closes another's.
            generator = noise.generator(seed, position, "wildcards")

            def pick(words: list[str]) -> str:
                return words[generator.integers(len(words))]

            columns = {name: resolved(columns[name], pick) for name in fields(template, True)}
            text = " ".join(resolved(template, pick).format_map(columns).split())     # an empty one leaves blanks behind
        else:
            text = template.format_map(columns).strip()
        if self.tags:
            text = ordered(text, self.tags, seed, position)
        if self.trigger and not re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", text):
            text = f"{self.trigger}, {text}" if text else self.trigger
        return f"{self.prefix}{text}{self.suffix}".strip()


def ordered(caption: str, how: Tags, seed: int, position: int) -> str:
    """A caption that is a list of tags, as it is drawn."""
    tags = [tag for part in caption.split(how.separator) if (tag := part.strip())]
    kept, rest = tags[:how.keep], tags[how.keep:]
    order, luck = range(len(rest)), [1.0] * len(rest)
    if how.shuffle:
        order = noise.permutation(len(rest), seed, position, "tag order").tolist()
    if how.dropout:
        luck = noise.generator(seed, position, "tag dropout").random(len(rest))
    kept += [rest[n] for n in order if luck[n] >= how.dropout]
    return f"{how.separator.rstrip()} ".join(kept)


def resolved(text: str, pick: Callable[[list[str]], str]) -> str:
    """The text with every `{a|b}` replaced by what `pick` makes of its alternatives, inner ones first: down to DEEPEST, and
    what is deeper is no caption that is trained (encode.check_captions)."""
    for _ in range(DEEPEST):
        text, found = ALTERNATIVES.subn(lambda match: pick(match[1].split("|")), text)
        if not found:
            break
    return text


def too_deep(text: str) -> bool:
    """Whether braces stand in braces more than DEEPEST times: each level is a pass of `resolved` over all of the text."""
    steps = (1 if brace == "{" else -1 for brace in text if brace in "{}")
    return max(accumulate(steps, lambda depth, step: max(0, depth + step), initial=0)) > DEEPEST


def fields(template: str, wildcards: bool = False) -> list[str]:
    """The columns that a template names. Raises FinetuneError for one that is not well formed."""
    if wildcards and too_deep(template):
        raise FinetuneError(f"data.caption.template: has more than {DEEPEST} braces in each other")
    whole = resolved(template, " ".join) if wildcards else template     # all alternatives beside each other
    try:
        parts = [part[1:] for part in Formatter().parse(whole) if part[1] is not None]
    except ValueError as e:
        raise FinetuneError(f"data.caption.template: {template!r}: {e}") from None
    for name, form, conversion in parts:
        if form or conversion or not name.isidentifier():
            raise FinetuneError(f"data.caption.template: {template!r}: {{{name}}} must be a column's name and nothing else, "
                                "such as {text}")
    return [name for name, _, _ in parts]


def literal(text: str) -> str:
    """The template of this very text, braces and all."""
    return text.replace("{", "{{").replace("}", "}}")
