"""Captions as pure functions of an example's columns."""

from string import Formatter

from finetune.errors import FinetuneError


def fields(template: str) -> list[str]:
    """The columns that a template names. Raises FinetuneError for one that is not well formed."""
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as e:
        raise FinetuneError(f"data.caption.template: {template!r}: {e}") from None
    for name, form, conversion in parts:
        if form or conversion or not name.isidentifier():
            raise FinetuneError(f"data.caption.template: {template!r}: {{{name}}} must be a column's name and nothing else, "
                                "such as {text}")
    return [name for name, _, _ in parts]


def caption(template: str, columns: dict[str, str]) -> str:
    return template.format_map(columns).strip()
