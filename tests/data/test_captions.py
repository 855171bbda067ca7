import pytest

from finetune.data.captions import caption, fields
from finetune.errors import FinetuneError


@pytest.mark.parametrize("template, names, expected", [
    ("{text}", ["text"], "a dog"),
    ("{text}, in inkwash style", ["text"], "a dog, in inkwash style"),
    ("a {colour} thing, {text}", ["colour", "text"], "a red thing, a dog"),
    ("one caption for all", [], "one caption for all"),
    ("  {text}  ", ["text"], "a dog"),
    ("{{literal}} {text}", ["text"], "{literal} a dog"),
    ("", [], ""),
])
def test_a_template_names_its_columns_and_is_filled(template, names, expected):
    assert fields(template) == names
    assert caption(template, {"text": "a dog", "colour": "red"}) == expected


def test_braces_of_a_caption_are_its_own():
    assert caption("{text}", {"text": "a {dog} {"}) == "a {dog} {"


@pytest.mark.parametrize("template", ["{text", "text}", "{}", "{0}", "{text.x}", "{text[0]}", "{a b}"])
def test_a_template_that_is_not_well_formed_is_told(template):
    with pytest.raises(FinetuneError, match=r"data\.caption\.template") as error:
        fields(template)
    assert repr(template) in str(error.value)


@pytest.mark.parametrize("template", ["{text:d}", "{text:{width}}", "{text!r}", "{text!x}"])
def test_a_template_does_nothing_but_name_columns(template):
    """Formats and conversions would fail, or change a caption, where it is filled."""
    with pytest.raises(FinetuneError, match=r"data\.caption\.template"):
        fields(template)
