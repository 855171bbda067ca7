"""A problem that pydantic found → what the user wrote, what was wanted, and the nearest right word."""

import inspect
from collections.abc import Sequence
from types import NoneType
from typing import get_args, get_origin

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


def explain(error: dict, root: type[BaseModel] = Recipe) -> str:
    """What is wrong in words of this model, and in an indented second line what would be right."""
    keys, kind, given, context = _keys(error), error["type"], error["input"], error.get("ctx", {})
    field, models = _at(keys[:-1] if kind == "extra_forbidden" else keys, root)
    if kind == "extra_forbidden":
        siblings = list(models[0].model_fields)
        name, here = str(keys[-1]), ".".join(key for key in written(error) if not key.isdecimal())
        elsewhere = [key for key in _all_keys(root) if key.rpartition(".")[2] == name and key != here]
        return f"unknown key{nearest(name, siblings, elsewhere)}\n    keys here: {', '.join(siblings)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_not_found":
        return f"missing\n    {models[0].model_fields['kind'].description}"
    if kind == "union_tag_invalid":
        kinds = (word for model in models for word in _words(model.model_fields["kind"].annotation))
        return _unknown("kind", given["kind"], sorted(kinds))
    meaning = f"\n    {field.description}" if field.description else ""
    if kind == "missing":
        return f"missing{meaning}"
    if kind in ("model_type", "model_attributes_type") or kind == "tuple_type" and models:
        several = " or a list of such" if kind == "tuple_type" else ""
        return f"wants a mapping of {', '.join(models[0].model_fields)}{several}; given {_shown(given)}"
    if kind == "literal_error":
        return _unknown(keys[-1], given, _words(field.annotation))
    wanted = WANTED[kind].format(**context) if kind in WANTED else error["msg"]
    return f"wants {wanted}; given {_shown(given)}{meaning}"


def written(error: dict) -> tuple[str, ...]:
    """The key as the user writes it. Where a value may be one of several models, pydantic names the one that it took."""
    keys = tuple(str(key) for i, key in enumerate(_keys(error))
                 if not (isinstance(key, str) and i and len(_at(error["loc"][:i], Recipe)[1]) > 1))
    return keys + ("kind",) if error["type"].startswith("union_tag") else keys


def _keys(error: dict) -> tuple[str | int, ...]:
    """Where it is; of a mapping's key itself, the place of its value."""
    return error["loc"][:-1] if error["loc"][-1:] == ("[key]",) else error["loc"]


def _unknown(name: str, given: object, words: Sequence[str]) -> str:
    near = nearest(given, words) if isinstance(given, str) else ""
    return f"unknown {name} {_shown(given)}{near}\n    one of: {', '.join(words)}"


def _shown(value: object) -> str:
    """A value as it is written in YAML, cut to a readable length."""
    if isinstance(value, (dict, list, tuple)):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return kind if value else f"{kind} with nothing in it"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _at(keys: tuple[str | int, ...], root: type[BaseModel]) -> tuple[FieldInfo | None, list[type[BaseModel]]]:
    """The field that holds a value, or the list or mapping that holds it; and the models that the value may be."""
    field, models, mapping = None, [root], False
    for key in (key for key in keys if isinstance(key, str)):
        if mapping:                 # a word of the user's
            mapping = False
        elif len(models) > 1:       # pydantic's, for the one that it took
            models = [model for model in models if key in _words(model.model_fields["kind"].annotation)]
        elif models:
            field = models[0].model_fields[key]
            models, mapping = _models(field.annotation), get_origin(field.annotation) is dict
    return field, models


def _models(annotation) -> list[type[BaseModel]]:
    """The models inside `Model`, `Model | None`, `tuple[A | B, ...]` or `dict[str, Model]`."""
    if arguments := get_args(annotation):
        return [model for argument in arguments for model in _models(argument)]
    return [annotation] if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else []


def _words(annotation) -> tuple[str, ...]:
    """The words of `Literal[…]` or `Literal[…] | None`, as YAML has them."""
    return sum((_words(argument) if get_args(argument) else (str(argument).lower() if isinstance(argument, bool) else argument,)
                for argument in get_args(annotation) if argument is not NoneType), ())


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the recipe, for a key that was written in the wrong place."""
    keys = {}
    for name, field in model.model_fields.items():
        keys |= dict.fromkeys([prefix + name, *(key for inner in _models(field.annotation)
                                                for key in _all_keys(inner, f"{prefix}{name}."))])
    return list(keys)
