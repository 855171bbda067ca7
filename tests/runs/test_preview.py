"""Previews: every strength beside the base, measured, in a process of their own, and never felt by the training."""

import json
import shutil

import pytest
from PIL import Image

from finetune.artifact import read_tensors
from finetune.cli import main
from finetune.header import read_header

WORDS = ["preview.prompts=[a red circle]", "preview.seeds=[1, 2]", "preview.strengths=[0.5, 1]", "preview.steps=1",
         "train.ema={decay: 0.5}", "train.keep_every=2"]
MEASURED = ["every.preview=2", "preview.metrics=['clip_i:pixels', 'diversity:pixels']", "train.keep_best=clip_i"]


def given(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def judged(run) -> list[dict]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "clip_i" in line]


def test_measured_kept_and_sampled_apart(recipe, train, tmp_path, capsys):
    with_them, plain = tmp_path / "with", tmp_path / "plain"
    assert train(recipe, with_them, *given(*WORDS, *MEASURED)) == 0
    assert train(recipe, plain, *given(*WORDS)) == 0
    name = "adapter/small.safetensors"
    tensors = read_tensors(plain / name)
    assert all((tensor == tensors[key]).all() for key, tensor in read_tensors(with_them / name).items())
    assert Image.open(with_them / "previews/step-00000002.png").width > 3 * 128       # the base and two strengths

    lines = judged(with_them)
    assert [line["step"] for line in lines] == [0, 2, 4, 6] and all("diversity" in line for line in lines)
    best = max(lines[1:], key=lambda line: line["clip_i"])["step"]
    assert read_header(with_them / "checkpoints/best.safetensors").metadata == {"step": str(best)}
    assert f"best      of step {best} by clip_i" in capsys.readouterr().err
    assert (with_them / "adapter/best/verify.json").exists()

    assert main(["preview", str(plain)]) == 0
    sheets = sorted(path.name for path in (with_them / "previews").iterdir())
    assert [path.name for path in sorted((plain / "previews").iterdir())] == sheets and len(sheets) == 4
    for sheet in sheets:
        assert (plain / "previews" / sheet).read_bytes() == (with_them / "previews" / sheet).read_bytes()
    capsys.readouterr()
    assert main(["preview", str(plain)]) == 0 and not capsys.readouterr().out       # all are there

    assert main(["preview", str(tmp_path)]) == 2 and "is no run folder" in capsys.readouterr().err

    # Killed after the checkpoint of step 4, with its preview measured but not yet written
    shutil.rmtree(with_them / "checkpoints/step-00000006")
    (with_them / "previews/step-00000004.png").unlink()
    assert train(recipe, with_them, *given(*WORDS, *MEASURED)) == 0
    assert judged(with_them) == lines


@pytest.mark.parametrize("words, said", [
    (["train.keep_best=dino"], "goes by dino, which is none of preview.metrics"),
    (["preview.strengths=[0.5]"], "at the strength 1, and that is left out"),
    (["preview.metrics=['copying:pixels']", "train.keep_best=copying"], "says not what is better"),
    (["preview.metrics=['kid:pixels']", "train.keep_best=kid"], "preview.metrics: kid:pixels: it compares whole sets")])
def test_mistakes(words, said, recipe, train, tmp_path, capsys):
    assert train(recipe, tmp_path / "run", *given(*WORDS, *MEASURED, *words)) == 2
    assert said in capsys.readouterr().err
