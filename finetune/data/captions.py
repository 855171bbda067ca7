"""Captions as pure functions of an example's columns."""

from string import Formatter

from finetune.errors import FinetuneError


def fields(template: str) -> list[str]:
    """The columns that a template names. Raises FinetuneError for one that is not well formed."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as e:
        raise FinetuneError(f"data.caption.template: {template!r}: {e}") from None
    if bad := [name for name in names if not name.isidentifier()]:
        raise FinetuneError(f"data.caption.template: {template!r}: {{{bad[0]}}} is no column name; write {{text}}")
    return names


def caption(template: str, columns: dict[str, str]) -> str:
    return template.format_map(columns).strip()
