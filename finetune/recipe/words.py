"""What the words of a recipe are made of: types with their limits, and shorter ways to write a value."""

from functools import partial
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from finetune import registry
from finetune.errors import FinetuneError

T = TypeVar("T")


class Fields(BaseModel):
    """Nothing is converted, no key is unknown, and the docstring under a field is its manual."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _goes_with_the_rest(cls, value: object, info: ValidationInfo) -> object:
        if why := cls.misfit(info.field_name, value, info.data):
            raise ValueError(why)
        return value

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        """Why the value of this field does not go with the fields before it, as far as these are right; None where it does."""


class Kind(Fields):
    """A word and what belongs to it alone; the rest must be left out."""

    model_config = ConfigDict(validate_default=True)
    own: ClassVar[dict[str, dict]]      # word → its own fields and their defaults
    word: ClassVar[str] = "kind"        # the field that holds the word
    called: ClassVar[str] = "kind"

    @field_validator("*")
    @classmethod
    def _goes_with_the_rest(cls, value: object, info: ValidationInfo) -> object:
        name, word = info.field_name, info.data.get(cls.word)
        owners = [word for word, fields in cls.own.items() if name in fields]
        if word is not None and owners:
            if word not in owners and value != cls.model_fields[name].default:
                raise ValueError(f"is of {', '.join(owners)}, and the {cls.called} is {word}; leave it out")
            value = cls.own[word].get(name) if value is None else value
        return super()._goes_with_the_rest(value, info)


def _registered(group: str, name: str) -> str:
    try:
        return registry.check(group, name)
    except FinetuneError as error:
        raise ValueError(str(error)) from None


def registered(group: str) -> AfterValidator:
    """The name of a file in that folder."""
    return AfterValidator(partial(_registered, group))


def _some(items: tuple) -> tuple:
    # Not `min_length`: pydantic counts only the items that are right, so one wrong item would be told twice.
    if not items:
        raise ValueError("wants at least one in the list")
    return items


def different(words: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(words)) < len(words):
        raise ValueError(f"{', '.join(words)}: each may be named once")
    return words


def list_of(key: str):
    """One item may be written without the list around it, and an item with nothing to add as the text of `key` alone."""
    def convert(value):
        items = [value] if isinstance(value, (str, dict)) else value
        if isinstance(value, dict) and value and not any(value.values()):       # what YAML makes of {text}
            raise ValueError("a text with braces needs quotes")
        return [{key: item} if isinstance(item, str) else item for item in items] if isinstance(items, list) else items
    return BeforeValidator(convert)


def _flag(value):
    if not isinstance(value, (bool, str)) or value == "":       # Python takes 1 for true
        raise ValueError("wants true, false or a word")
    return value


def _named(value):
    """What needs no numbers of its own may be written as its kind alone."""
    return {"kind": value} if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Many = Annotated[tuple[T, ...], Field(strict=False)]
Some = Annotated[Many[T], AfterValidator(_some)]
Pair = Annotated[tuple[T, T], Field(strict=False)]
NAMED = BeforeValidator(_named)
FLAG = BeforeValidator(_flag)
