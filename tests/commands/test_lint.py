"""Each thing that may be wrong with data is told once, and a clean folder is told to be clean."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from finetune.cli import main
from finetune.families import sd1


def picture(seed: int, size=(64, 64)) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path):
    """Eight captioned pictures with nothing wrong."""
    (tmp_path / "pictures").mkdir()
    for n in range(8):
        picture(n).save(tmp_path / "pictures" / f"{n}.png")
        (tmp_path / "pictures" / f"{n}.txt").write_text(f"picture number {n}")
    return tmp_path / "pictures"


@pytest.fixture
def recipe(tmp_path, folder):
    path = tmp_path / "r.yaml"
    path.write_text(f"base: {{family: sd1, path: tiny}}\ndata: {{images: '{folder}', resolution: 64}}\n"
                    "method: {kind: lora, rank: 2}\ntrain: {max_steps: 100, batch_size: 3}\n")
    return path


@pytest.fixture
def lint(recipe, capsys):
    """(*settings) → exit code, and {(kind, file or field): (text, fatal)} of the notes."""
    def call(*settings):
        code = main(["lint", str(recipe), "--json", *(word for setting in settings for word in ("--set", setting))])
        report = json.loads(capsys.readouterr().out)
        assert report["code"] == code
        call.report = report
        return code, {(note["kind"], note["name"].rpartition("/")[2]): (note["text"], note["fatal"])
                      for note in report["notes"]}
    return call


def test_a_clean_folder(lint, recipe, capsys):
    assert lint() == (0, {})
    assert lint.report["pictures"] == {"learn": 8} and lint.report["plan"]["epoch"] == 3
    assert lint.report["buckets"] == [{"width": 64, "height": 64, "pictures": 8, "steps": 3, "last": 2}]
    assert main(["lint", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "nothing found" in said and "64 × 64         8      3            2" in said


def test_files_that_are_no_pictures_are_refused(lint, folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:150])
    (folder / "text.jpg").write_text("a text")
    code, notes = lint()
    assert code == 2 and {key for key, (_, fatal) in notes.items() if fatal} == {
        ("unreadable", name) for name in ("empty.png", "cut.png", "text.jpg")}
    code, notes = lint("data.unreadable=skip")
    assert code == 1 and not any(fatal for _, fatal in notes.values())


def test_odd_files_are_warnings(lint, folder):
    picture(20).save(folder / "7.png", "JPEG")
    (folder / "orphan.txt").write_text("nobody")
    (folder / "old.gif").write_bytes(b"GIF89a")
    code, notes = lint()
    assert code == 1 and notes == {("suffix", "7.png"): ("is .jpg by its content", False),
                                   ("suffix", "old.gif"): (notes["suffix", "old.gif"][0], False),
                                   ("sidecar", "orphan.txt"): ("there is no picture of this name beside it", False)}


def test_copies_are_warnings(lint, folder):
    shutil.copy(folder / "0.png", folder / "7.png")
    picture(1).save(folder / "6.png", "JPEG", quality=90)
    code, notes = lint()
    assert code == 1
    assert notes["copy", "7.png"] == (f"is the same as {folder}/0.png", False)
    assert notes["copy", "6.png"] == (f"shows the same as {folder}/1.png", False)


def test_copies_of_what_is_held_out_are_refused_and_of_the_class_not(lint, folder, tmp_path):
    for name in ("held", "class"):
        (tmp_path / name).mkdir()
        picture(30).save(tmp_path / name / "own.png")
    picture(40).save(tmp_path / "class" / "own.png")
    (tmp_path / "held" / "own.txt").write_text("of its own")
    shutil.copy(folder / "3.png", tmp_path / "class" / "copy.png")
    prior, held = f"data.prior={{prompt: a thing, images: '{tmp_path}/class'}}", f"data.validation.images={tmp_path}/held"
    assert lint(prior, held) == (1, {("copy", "copy.png"): (f"is the same as {folder}/3.png and is of the class", False)})
    shutil.copy(folder / "4.png", tmp_path / "held" / "copy.png")
    (tmp_path / "held" / "copy.txt").write_text("a copy")
    code, notes = lint(held)
    assert code == 2 and notes == {("copy", "copy.png"): (f"is the same as {folder}/4.png and is held out", True)}


def test_a_split_that_cannot_be_followed_is_refused(lint, folder, tmp_path):
    assert lint("data.validation.fraction=0.25")[0] == 0
    assert lint.report["pictures"] == {"learn": 6, "validation": 2}
    (tmp_path / "held.txt").write_text("9.png\n")
    code, notes = lint(f"data.validation.files={tmp_path}/held.txt")
    assert code == 2 and "there is no picture '9.png'" in notes["validation", "data.validation.files"][0]


def test_sizes_and_shapes(lint, folder):
    picture(5, (32, 48)).save(folder / "5.png")
    picture(6, (200, 80)).save(folder / "6.png")
    assert lint() == (1, {("small", "5.png"): ("32 × 48 is enlarged 2.00 times to 64 × 64", False),
                          ("shape", "5.png"): ("32 × 48 loses 33% when it is cut to 64 × 64", False),
                          ("shape", "6.png"): ("200 × 80 loses 60% when it is cut to 64 × 64", False)})
    assert lint("data.buckets.step=8")[1] == {("small", "5.png"): ("32 × 48 is enlarged 1.67 times to 48 × 80", False)}
    assert [b["pictures"] for b in lint.report["buckets"]] == [1, 6, 1]
    assert lint("data.buckets={step: 8, upscale: false}") == (0, {})
    picture(5, (4, 60)).save(folder / "5.png")
    code, notes = lint("data.buckets={step: 8, upscale: false}")
    assert code == 2 and "smaller than data.buckets.step" in notes["size", "5.png"][0]
    code, notes = lint("data.buckets={step: 16, shortest: 500, longest: 600}")
    assert code == 2 and ("size", "data.buckets") in notes


def test_captions(lint, folder):
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_text(" \n")
    for n in (2, 3, 4):
        (folder / f"{n}.txt").write_text("the same")
    (folder / "5.txt").write_text("many words " * 50)
    (folder / "6.txt").write_text(", ,")
    code, notes = lint("data.caption.tags={keep: 0}")
    assert code == 2 and {key: fatal for key, (_, fatal) in notes.items()} == {
        ("caption", "0.png"): True, ("caption", "1.png"): True, ("caption", "2.png"): False, ("long", "5.png"): True,
        ("caption", "6.png"): False}
    assert "'the same'" in notes["caption", "2.png"][0] and notes["caption", "6.png"][0] == "its caption is empty"


@pytest.mark.parametrize("long, fatal", [("error", True), ("truncate", False), ("chunk", None)])
@pytest.mark.parametrize("drawn", [False, True])
def test_long_captions(lint, folder, long, fatal, drawn):
    (folder / "5.txt").write_text("a word, " * 40)
    code, notes = lint(f"data.caption.long={long}", *(["data.caption.tags.shuffle=true"] if drawn else []))
    assert {key: fatal for key, (_, fatal) in notes.items()} == ({} if fatal is None else {("long", "5.png"): fatal})


def test_prompts_are_looked_at_too(lint):
    long = "word " * 90
    code, notes = lint(f"preview.prompts=['{long}']")
    assert code == 2 and ("long", "preview.prompts") in notes


def test_the_trigger_is_counted(lint, folder, recipe, capsys):
    (folder / "3.txt").write_text("a zwx on a table")
    assert lint("data.caption.trigger=zwx") == (0, {}) and lint.report["plan"]["trigger"] == 1
    main(["lint", str(recipe), "--set", "data.caption.trigger=zwx"])
    assert "1 captions have it" in capsys.readouterr().out


def test_masks(lint, folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for n in range(7):
        Image.new("L", (64, 64), 255).save(masks / f"{n}.png")
    Image.new("L", (32, 64), 255).save(masks / "3.png")
    Image.new("L", (64, 64), 255).save(masks / "other.png")
    code, notes = lint(f"data.mask.source={masks}")
    assert code == 2 and {key: fatal for key, (_, fatal) in notes.items()} == {
        ("mask", "3.png"): True, ("mask", "7.png"): True, ("mask", "other.png"): False}


@pytest.mark.parametrize("steps, advice", [(1, "some of them never"), (3, None), (2000, "known by heart")])
def test_how_often_pictures_are_seen(lint, steps, advice):
    code, notes = lint(f"train.max_steps={steps}")
    assert code == (1 if advice else 0) and [advice in text for text, _ in notes.values()] == [True] * code


def test_the_weights_are_not_read_and_a_base_out_of_reach_is_no_mistake(lint, monkeypatch, recipe, capsys):
    monkeypatch.setattr(sd1, "load", None)
    assert lint()[0] == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert lint("base.path=someone/some-model") == (0, {}) and "someone/some-model is neither" in lint.report["undone"][0]
    assert main(["lint", str(recipe), "--set", "base.path=someone/some-model"]) == 0
    assert "not checked: base: base.path: someone/some-model" in capsys.readouterr().out


def test_what_is_not_there_is_refused(lint, tmp_path):
    code, notes = lint("data.images=/absent", "base.path=/absent", f"data.mask.source={tmp_path}/none")
    assert code == 2 and set(notes) == {("source", "data.images"), ("base", "base.path")}
    assert main(["lint", str(tmp_path / "absent.yaml")]) == 2


def test_many_of_a_kind_are_counted(recipe, folder, capsys):
    for n in range(8):
        (folder / f"{n}.txt").unlink()
    assert main(["lint", str(recipe)]) == 2
    said = capsys.readouterr().out
    assert f"{folder}/4.png" in said and f"{folder}/5.png" not in said and "… and 3 more" in said
    assert "8 errors: it cannot be trained" in said


def test_a_wrong_recipe_is_told_without_torch(tmp_path):
    (tmp_path / "r.yaml").write_text("base: {family: sd2}")
    code = ("import sys; from finetune.cli import main; code = main(['lint', sys.argv[1]]); "
            "assert 'torch' not in sys.modules; sys.exit(code)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.yaml")], capture_output=True).returncode == 2
