"""The user's mistakes, as one exception, and the words that help to put them right."""

import difflib
from collections.abc import Iterable


class FinetuneError(Exception):
    """Something the user can put right: said as what, where, why and what to do, without a traceback."""


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the words, or nothing."""
    lowered = {other.lower(): other for other in words}
    near = difflib.get_close_matches(word.lower(), lowered, 1)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def refuse(problems: list[str]) -> None:
    """Raise all problems as one FinetuneError; with none, go on."""
    if problems:
        raise FinetuneError("\n".join(problems))
