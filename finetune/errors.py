"""The user's mistakes, as one exception, and the words that help to put them right."""

import difflib
from collections.abc import Iterable


class FinetuneError(Exception):
    """Something the user can put right: said as what, where, why and what to do, without a traceback."""


def nearest(word: str, words: Iterable[str], also: Iterable[str] = ()) -> str:
    """`; did you mean 'x'?` for the nearest of the words, and for all that are `also` meant; or nothing."""
    lowered = {other.lower(): other for other in words}
    near = [lowered[other] for other in difflib.get_close_matches(word.lower(), lowered, 1)] + list(also)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def refuse(problems: list[str], head: str = "") -> None:
    """Raise all problems as one FinetuneError, or the first twenty of them under a head; with none, go on."""
    if problems and head:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise FinetuneError("\n    ".join([head, *problems[:20], *more]))
    if problems:
        raise FinetuneError("\n".join(problems))
