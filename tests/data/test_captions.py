from collections import Counter
from itertools import permutations
from math import sqrt

import pytest
from PIL import Image

from finetune.data.captions import Captions, fields, literal, ordered
from finetune.data.encode import check_captions
from finetune.errors import FinetuneError
from finetune.recipe.data import Tags

N = 4000
DOG = {"text": "a dog", "colour": "red"}


def one(template="{text}", **more):
    return Captions(((template, 1.0),), **more)


def drawn(captions, columns, count=N, seed=1):
    return [captions.caption(columns, seed, position) for position in range(count)]


def near(count, share, total=N):
    """Within five standard deviations."""
    return abs(count - share * total) <= 5 * sqrt(total * share * (1 - share)) + 1e-9


# templates

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
    captions = one(template)
    assert fields(template) == captions.columns() == names
    assert captions.caption(DOG, 0, 0) == expected and captions.every(DOG) == [expected]


@pytest.mark.parametrize("text", ["a {dog} {", "{a|b}", "two  blanks", "{text}"])
def test_braces_and_blanks_of_a_caption_are_its_own(text):
    assert one().caption({"text": text}, 0, 0) == text
    assert one(literal(text)).caption({}, 0, 0) == text and one(literal(text)).columns() == []


@pytest.mark.parametrize("wildcards", [False, True])
@pytest.mark.parametrize("template", ["{text", "text}", "{}", "{0}", "{text.x}", "{text[0]}", "{a b}"])
def test_a_template_that_is_not_well_formed_is_told(template, wildcards):
    with pytest.raises(FinetuneError, match=r"data\.caption\.template: ") as error:
        Captions((("{text}", 1.0), (template, 1.0)), wildcards=wildcards)
    assert repr(template) in str(error.value)


@pytest.mark.parametrize("template", ["{text:d}", "{text:{width}}", "{text!r}", "{text!x}"])
def test_a_template_does_nothing_but_name_columns(template):
    """Formats and conversions would fail, or change a caption, where it is filled."""
    with pytest.raises(FinetuneError, match=r"data\.caption\.template"):
        one(template)


# choices

BOTH = Captions((("{human}", 1.0), ("{synthetic}, {colour}", 3.0), ("{human} by {artist}", 2.0)))


@pytest.mark.parametrize("columns, shares", [
    ({"human": "h", "synthetic": "s", "colour": "red", "artist": "x"}, {"h": 1 / 6, "s, red": 1 / 2, "h by x": 1 / 3}),
    ({"human": "h", "synthetic": "s", "colour": "red"}, {"h": 1 / 4, "s, red": 3 / 4}),
    ({"human": "h", "synthetic": "  ", "colour": "red", "artist": "x"}, {"h": 1 / 3, "h by x": 2 / 3}),
    ({"synthetic": "s", "colour": "red"}, {"s, red": 1.0}),
])
def test_one_of_the_choices_that_can_be_made_is_drawn_by_its_weight(columns, shares):
    counts = Counter(drawn(BOTH, columns))
    assert counts.keys() == shares.keys() == set(BOTH.every(columns)) and BOTH.missing(columns) == []
    assert all(near(counts[caption], share) for caption, share in shares.items())


def test_an_example_of_which_nothing_can_be_made_is_told_by_the_first_choice():
    assert BOTH.missing({"colour": "red", "artist": "x", "synthetic": ""}) == ["human"]
    assert one("{text}, {text} and {colour}").missing({"text": " "}) == ["text", "colour"]
    assert BOTH.columns() == ["artist", "colour", "human", "synthetic"]


def test_a_choice_without_columns_can_always_be_made():
    captions = Captions((("{text}", 1.0), ("a photo", 1.0)))
    assert captions.missing({}) == [] and captions.every({}) == ["a photo"] and set(drawn(captions, {}, 20)) == {"a photo"}


# what stands around a caption

@pytest.mark.parametrize("text, expected", [
    ("a dog", "zwx, a dog"), ("a zwx dog", "a zwx dog"), ("zwx", "zwx"), ("a zwxy dog", "zwx, a zwxy dog"),
    ("dog (zwx)", "dog (zwx)"), ("zwx-like", "zwx-like"), (",", "zwx"),
])
def test_the_trigger_comes_first_unless_the_caption_has_it(text, expected):
    assert one(trigger="zwx", tags=Tags()).caption({"text": text}, 0, 0) == expected


def test_a_trigger_is_no_pattern():
    assert one(trigger="c++ (x").caption({"text": "a c++ (x dog"}, 0, 0) == "a c++ (x dog"
    assert one(trigger="a.b").caption({"text": "axb"}, 0, 0) == "a.b, axb"


def test_the_trigger_is_not_shuffled_and_stands_behind_the_prefix():
    captions = one(trigger="zwx", prefix="photo of ", suffix=" in ink", tags=Tags(shuffle=True))
    assert set(drawn(captions, {"text": "a, b"}, 100)) == {"photo of zwx, a, b in ink", "photo of zwx, b, a in ink"}


def test_prefix_and_suffix_are_put_around_as_they_are():
    assert one(prefix="a {text} of  ", suffix="|x").caption({"text": " it "}, 0, 0) == "a {text} of  it|x"
    assert one("{text}", prefix="by me, ", tags=Tags()).caption({"text": ",,"}, 0, 0) == "by me,"


# dropout

def test_dropout_leaves_nothing_of_a_caption_at_its_rate():
    captions = one(trigger="zwx", prefix="a ", dropout=0.2)
    counts = Counter(drawn(captions, DOG))
    assert counts.keys() == {"", "a zwx, a dog"} == set(captions.every(DOG)) and near(counts[""], 0.2)
    assert set(drawn(one(dropout=1.0), DOG, 50)) == {""} and "" not in drawn(one(), DOG)


# tags

@pytest.mark.parametrize("tags, text, expected", [
    (Tags(), " a ,b,, c d ,", "a, b, c d"),
    (Tags(separator="|"), "a|b |c,d", "a| b| c,d"),
    (Tags(separator=" | "), "a | b", "a | b"),
    (Tags(separator=" "), "a  b c", "a b c"),
    (Tags(), "", ""),
])
def test_tags_are_tidied(tags, text, expected):
    assert ordered(text, tags, 0, 0) == expected


def test_the_first_tags_stay_and_the_others_are_shuffled_evenly():
    captions = one(tags=Tags(shuffle=True, keep=2))
    counts = Counter(drawn(captions, {"text": "k1,k2,a,b,c"}))
    assert counts.keys() == {", ".join(("k1", "k2", *rest)) for rest in permutations("abc")}
    assert all(near(count, 1 / 6) for count in counts.values())


def test_each_tag_but_the_first_is_dropped_at_its_rate_and_by_itself():
    captions = one(tags=Tags(keep=1, dropout=0.3))
    seen = [caption.split(", ") for caption in drawn(captions, {"text": "k, a, b"})]
    assert all(tags[0] == "k" and tags == sorted(tags, key="kab".index) for tags in seen)
    for tags, share in (("a", 0.7), ("b", 0.7), ("ab", 0.49)):
        assert near(sum(set(tags) <= set(left) for left in seen), share)


@pytest.mark.parametrize("keep", [3, 9])
def test_with_all_tags_kept_nothing_is_drawn(keep):
    assert set(drawn(one(tags=Tags(shuffle=True, keep=keep, dropout=0.9)), {"text": "a,b,c"}, 100)) == {"a, b, c"}


# wildcards

WILD = one(wildcards=True)


@pytest.mark.parametrize("text, shares", [
    ("a {red|blue} car", {"a red car": 0.5, "a blue car": 0.5}),
    ("a {|big |small }car", {"a car": 1 / 3, "a big car": 1 / 3, "a small car": 1 / 3}),
    ("a {|} car", {"a car": 1.0}),
    ("{a|{b|c}}", {"a": 0.5, "b": 0.25, "c": 0.25}),
    ("{a|b}{c|d}", {pair: 0.25 for pair in ("ac", "ad", "bc", "bd")}),
    ("{{a|b}} {c}", {"{a} {c}": 0.5, "{b} {c}": 0.5}),
    ("{x {c}|y}", {"x {c}": 0.5, "y": 0.5}),
    ("{ {a|b} |", {"{ a |": 0.5, "{ b |": 0.5}),
    ("a} | {b", {"a} | {b": 1.0}),
    ("{text}", {"{text}": 1.0}),
])
def test_wildcards_of_a_column(text, shares):
    counts = Counter(drawn(WILD, {"text": text}))
    assert counts.keys() == shares.keys() and all(near(counts[caption], share) for caption, share in shares.items())


@pytest.mark.parametrize("template, columns, expected", [
    ("a {red|blue} {text}", ["text"], {"a red a dog", "a blue a dog"}),
    ("{{text}|nothing}", ["text"], {"a dog", "nothing"}),
    ("{a {colour} one|{text}|{x|y}}", ["colour", "text"], {"a red one", "a dog", "x", "y"}),
    ("{{literal}} {a|b}", [], {"{literal} a", "{literal} b"}),
])
def test_wildcards_of_a_template_stand_beside_its_columns(template, columns, expected):
    captions = one(template, wildcards=True)
    assert captions.columns() == columns and set(drawn(captions, DOG, 200)) == expected


@pytest.mark.parametrize("template", ["{red|blue", "{{a|b}}", "{te{x|y}t}", "{a|{b c}}", "{a|b}}"])
def test_wildcards_of_a_template_have_to_be_well_formed(template):
    with pytest.raises(FinetuneError, match=r"data\.caption\.template"):
        one(template, wildcards=True)


def nested(depth):
    return "{a|" * depth + "b" + "}" * depth


def test_alternatives_nested_far_too_deeply_are_told_and_never_drawn(tmp_path, streamed):
    """Each level is a pass over the whole caption: 8000 of them took 26 s a draw."""
    assert drawn(WILD, {"text": nested(20)}, 1) == ["a"] and "{a|" in drawn(WILD, {"text": nested(8000)}, 1)[0]
    for depth, told in ((20, False), (21, True)):
        (tmp_path / f"{depth}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"{depth}" / "0.png")
        (tmp_path / f"{depth}" / "0.txt").write_text("} {x} {y} " + nested(depth))
        index = streamed(tmp_path / f"{depth}").index
        assert ["0.png: the text beside it has more than 20 braces" in f"{note.name}: {note.text}"
                for note in check_captions(index, WILD)] == [True] * told
        assert not check_captions(index, one())
    with pytest.raises(FinetuneError, match="template: has more than 20 braces"):
        one(nested(8000), wildcards=True)


def test_without_wildcards_alternatives_are_no_template():
    with pytest.raises(FinetuneError, match="must be a column's name"):
        one("{red|blue} {text}")


def test_a_brace_of_a_column_closes_no_other():
    captions = one("{{text}|nothing} {text}", wildcards=True)
    assert set(drawn(captions, {"text": "a|b}"}, 100)) == {"a|b} a|b}", "nothing a|b}"}


def test_tags_can_be_wildcards():
    captions = one(wildcards=True, tags=Tags(shuffle=True, keep=1))
    assert set(drawn(captions, {"text": "{a|b}, {|c}, d"}, 300)) == {
        f"{first}, {rest}" for first in "ab" for rest in ("d", "c, d", "d, c")}


# all of it

ALL = [
    one(), BOTH, WILD, one(dropout=0.5, trigger="zwx"),
    Captions((("{text}, {colour}", 1.0), ("{colour}", 2.0)), "t", "p ", " s", Tags(), False, 0.1),
    Captions((("{text}, {colour}", 1.0), ("{x|{colour}}", 2.0)), "t", "p ", " s", Tags(shuffle=True, keep=1, dropout=0.2), True, 0.1),
]


@pytest.mark.parametrize("captions", ALL)
def test_a_caption_is_a_function_of_the_position(captions):
    columns = {"text": "a, {b|c}, d", "colour": "red", "human": "h", "synthetic": "s", "artist": "x"}
    forwards = drawn(captions, columns, 200)
    assert [captions.caption(columns, 1, p) for p in reversed(range(200))] == forwards[::-1]
    assert len(set(forwards)) == 1 or drawn(captions, columns, 200, seed=2) != forwards


@pytest.mark.parametrize("captions", ALL)
def test_every_lists_all_that_can_be_drawn(captions):
    columns = {"text": "a, b", "colour": "red", "human": "h", "synthetic": "s"}
    every = captions.every(columns)
    assert (every is not None) == captions.finite
    if captions.finite:
        assert set(drawn(captions, columns, 500)) == set(every) and len(every) == len(set(every))


@pytest.mark.parametrize("more, finite", [
    ({}, True), ({"dropout": 0.1}, True), ({"tags": Tags(keep=1)}, True), ({"wildcards": True}, False),
    ({"tags": Tags(shuffle=True)}, False), ({"tags": Tags(dropout=0.1)}, False),
])
def test_what_can_be_listed(more, finite):
    assert one(**more).finite == finite


def test_no_draw_moves_another():
    """Whatever is turned on, what the other streams decide stays as it was."""
    columns = {"text": "a, b, c, d, e", "colour": "c, b, e, a, d"}
    choices = (("{text}", 1.0), ("{colour}", 1.0))
    plain = drawn(Captions(choices, tags=Tags()), columns)
    for n, caption in enumerate(drawn(Captions(choices, tags=Tags(), dropout=0.5, wildcards=True), columns)):
        assert caption in ("", plain[n])
    shuffled, dropped, both = (drawn(Captions(choices, tags=tags), columns) for tags in (
        Tags(shuffle=True), Tags(dropout=0.4), Tags(shuffle=True, dropout=0.4)))
    for caption, order, left in zip(both, shuffled, dropped):
        assert caption.split(", ") == [tag for tag in order.split(", ") if tag in left.split(", ")] or caption == left == ""
    with_choice = [caption for caption, first in zip(drawn(Captions(choices, dropout=0.5), columns),
                                                     drawn(Captions(choices), columns)) if first == columns["text"]]
    assert near(with_choice.count(""), 0.5, len(with_choice))      # and they do not follow each other


def test_a_word_may_stand_for_the_value_of_a_column():
    captions = Captions((("a {colour} {text}", 1.0),), stands={"colour": {"red": "colour-red"}})
    assert captions.every({"colour": " red ", "text": "red ball"}) == ["a colour-red red ball"]
    assert captions.every({"colour": "blue", "text": "ball"}) == ["a blue ball"]
