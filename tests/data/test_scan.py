import json

import pytest
from PIL import Image

from finetune.data.scan import fingerprint, scan
from finetune.errors import FinetuneError


def folder(root, names=("a.png", "b.png"), rows=None):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i, 6), (i, 0, 0)).save(root / name)
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def captions(root, template="{text}"):
    return {example.file.name: example.columns.get("text") for example in scan(str(root), template)}


def problem(root, template="{text}") -> str:
    with pytest.raises(FinetuneError) as error:
        scan(str(root), template)
    assert str(error.value).startswith("data.images: ")
    return str(error.value)


ROWS = [{"file_name": "a.png", "text": "an a"}, {"file_name": "b.png", "text": "a b"}]


def test_a_table_gives_captions_and_columns(tmp_path):
    folder(tmp_path, rows=[ROWS[0] | {"colour": "red"}, "", ROWS[1] | {"n": 3}])
    a, b = scan(str(tmp_path), "{text}")
    assert a.columns == {"text": "an a", "colour": "red"} and b.columns == {"text": "a b", "n": "3"}
    assert (a.width, a.height, b.width) == (8, 6, 9) and a.digest != b.digest


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_a_file_beside_the_picture_is_its_caption(suffix, tmp_path):
    folder(tmp_path, ["a.png", "b.JPG"])
    (tmp_path / f"a{suffix}").write_text("\ufeffein schöner\n  Hund \n", encoding="utf-8")
    (tmp_path / f"b{suffix}").write_text("b")
    assert captions(tmp_path) == {"a.png": "ein schöner Hund", "b.JPG": "b"}


def test_folders_are_searched_and_tables_lie_in_any(tmp_path):
    folder(tmp_path / "one", ["x/a.png"], [{"file_name": "x/a.png", "text": "1"}])
    folder(tmp_path / "two", ["a.png"], [{"file_name": "./a.png", "text": "2"}])
    assert [e.columns["text"] for e in scan(str(tmp_path), "{text}")] == ["1", "2"]


def test_a_row_may_hold_any_character(tmp_path):
    text = "a\u2028b \x85 c \U0001f600"
    assert captions(folder(tmp_path, ["a.png"], [{"file_name": "a.png", "text": text}])) == {"a.png": text}


def test_hidden_files_and_folders_are_none_of_the_pictures(tmp_path):
    folder(tmp_path, ["a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png"], ROWS[:1])
    assert captions(tmp_path) == {"a.png": "an a"}


def test_a_template_without_columns_needs_no_captions(tmp_path):
    assert len(scan(str(folder(tmp_path)), "a photo of a dog")) == 2


def test_there_is_no_folder_or_no_picture(tmp_path):
    assert "there is no folder" in problem(tmp_path / "absent")
    assert "holds no pictures" in problem(tmp_path) and ".webp" in problem(tmp_path)
    (tmp_path / "file").write_text("")
    assert "no folder" in problem(tmp_path / "file")


@pytest.mark.parametrize("row", [{}, {"text": ""}, {"text": "  "}, {"text": None}])
def test_a_picture_without_caption_is_named(row, tmp_path):
    folder(tmp_path, rows=[ROWS[0], {"file_name": "b.png", **row}])
    said = problem(tmp_path)
    assert "b.png: no caption" in said and "b.txt" in said and "a.png" not in said


def test_an_empty_caption_file_is_no_caption(tmp_path):
    folder(tmp_path, rows=ROWS[:1])
    (tmp_path / "b.txt").write_text(" \n")
    assert "b.png: no caption" in problem(tmp_path)


def test_a_missing_column_is_named(tmp_path):
    said = problem(folder(tmp_path, rows=[ROWS[0] | {"colour": "red"}, ROWS[1]]), "{colour} {text}")
    assert "b.png: no column colour" in said and "a.png" not in said


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    folder(tmp_path, ["a.png", "b.png", "c.png"], [ROWS[0], "{no json", {"text": "x"}, [1], {"file_name": "gone.png"}])
    (tmp_path / "c.png").write_bytes(b"<html>")
    (tmp_path / "c.txt").write_text("c")
    said = problem(tmp_path)
    for part in ("b.png: no caption", "c.png: not a readable picture", "metadata.jsonl:2:", "metadata.jsonl:3:",
                 "metadata.jsonl:4:", "metadata.jsonl:5: there is no gone.png"):
        assert part in said, part


def test_a_long_list_of_problems_is_cut(tmp_path):
    said = problem(folder(tmp_path, [f"{i:02}.png" for i in range(30)]))
    assert said.count("no caption") == 20 and "and 10 more" in said


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "metadata.jsonl"])
def test_captions_in_another_encoding_are_told(name, tmp_path):
    folder(tmp_path, ["a.png"])
    (tmp_path / name).write_bytes('{"file_name": "a.png", "text": "schön"}'.encode("latin-1"))
    said = problem(tmp_path)
    assert name in said and "UTF-8" in said


def test_a_row_for_something_that_is_not_trained_on_is_told(tmp_path):
    """Its caption would be lost without a word."""
    folder(tmp_path, rows=[*ROWS, {"file_name": "c.gif", "text": "c"}])
    Image.new("P", (4, 4)).save(tmp_path / "c.gif")
    assert "metadata.jsonl:3" in problem(tmp_path) and "c.gif" in problem(tmp_path)


def test_two_rows_for_one_picture_are_told(tmp_path):
    said = problem(folder(tmp_path, rows=[*ROWS, {"file_name": "a.png", "text": "another a"}]))
    assert "metadata.jsonl:3" in said and "a.png" in said


def test_the_fingerprint_tells_pictures_and_captions_not_places(tmp_path):
    one = fingerprint(scan(str(folder(tmp_path / "1", rows=ROWS)), "{text}"))
    assert fingerprint(scan(str(folder(tmp_path / "2", rows=ROWS)), "{text}")) == one
    words = [ROWS[0], ROWS[1] | {"text": "other"}]
    assert fingerprint(scan(str(folder(tmp_path / "3", rows=words)), "{text}")) != one
    Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "2" / "a.png")
    assert fingerprint(scan(str(tmp_path / "2"), "{text}")) != one
