"""A problem that pydantic found → what the user wrote, what was wanted, and the nearest right word."""

import inspect
from types import NoneType
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune.errors import nearest
from finetune.recipe.schema import Recipe

WANTED = {
    "string_type": "text (in quotes, if YAML reads it as something else)",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_long": "at most {max_length} in the list",
    "string_too_short": "a text that is not empty",
}


def explain(error: dict) -> str:
    """What is wrong, and in an indented second line what would be right."""
    keys, kind, given, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        siblings = list(_model(keys[:-1]).model_fields)
        name = str(keys[-1])
        elsewhere = [key for key in _all_keys(Recipe) if key.rpartition(".")[2] == name]
        return f"unknown key{nearest(name, siblings, elsewhere)}\n    keys here: {', '.join(siblings)}"
    if kind == "value_error":
        return str(context["error"])
    meaning = f"\n    {_field(keys).description}"
    if kind == "missing":
        return f"missing{meaning}"
    if kind == "model_type" or kind == "tuple_type" and _inner(_field(keys).annotation):
        several = " or a list of such" if kind == "tuple_type" else ""
        return f"wants a mapping of {', '.join(_model(keys).model_fields)}{several}; given {_shown(given)}"
    if kind == "literal_error":
        words = _words(_field(keys).annotation)
        near = nearest(given, words) if isinstance(given, str) else ""
        return f"unknown {keys[-1]} {_shown(given)}{near}\n    one of: {', '.join(words)}"
    wanted = WANTED[kind].format(**context) if kind in WANTED else error["msg"]
    return f"wants {wanted}; given {_shown(given)}{meaning}"


def _shown(value: object) -> str:
    """A value as it is written in YAML, cut to a readable length."""
    if isinstance(value, (dict, list, tuple)):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return kind if value else f"{kind} with nothing in it"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _field(keys: tuple[str | int, ...]) -> FieldInfo:
    """The field that holds a value, or the list or mapping that holds it."""
    model = Recipe
    for name in (key for key in keys if isinstance(key, str)):
        if model is None:       # a word of the user's, in a mapping
            break
        field = model.model_fields[name]
        model = _inner(field.annotation)
    return field


def _model(keys: tuple[str | int, ...]) -> type[BaseModel]:
    """The model at a key of the recipe."""
    model = Recipe
    for key in keys:
        if isinstance(key, str):
            model = _inner(model.model_fields[key].annotation)
    return model


def _inner(annotation) -> type[BaseModel] | None:
    """The model inside `Model`, `Model | None` or `tuple[Model, ...]`."""
    if arguments := get_args(annotation):
        return next(filter(None, map(_inner, arguments)), None)
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def _words(annotation) -> tuple[str, ...]:
    """The words of `Literal[…]` or `Literal[…] | None`."""
    return sum((_words(argument) if get_args(argument) else (argument,) for argument in get_args(annotation)
                if argument is not NoneType), ())


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the recipe, for a key that was written in the wrong place."""
    keys = []
    for name, field in model.model_fields.items():
        inner = _inner(field.annotation)
        keys += [prefix + name] + (_all_keys(inner, f"{prefix}{name}.") if inner else [])
    return keys
