"""The loss on held-out pictures: apart from training, the same at every resume, and what the best is chosen by."""

import json
import shutil
from types import SimpleNamespace

import pytest

from finetune.artifact import read_tensors
from finetune.cli import main
from finetune.header import read_header
from finetune.runfolder import RunFolder
from finetune.train import best as watch

WATCHED = ["data.validation.fraction=0.3", "every.validate=2", "train.keep_best=true"]


def lines(run, key: str) -> list[dict]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in line]


def given(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture
def watched(recipe, tmp_path, train):
    assert train(recipe, tmp_path / "watched", *given(WATCHED)) == 0
    return tmp_path / "watched"


def test_it_changes_no_bit_and_is_resumed(recipe, tmp_path, train, watched):
    assert train(recipe, tmp_path / "plain", *given(WATCHED[:1])) == 0
    file = "adapter/small.safetensors"
    plain = read_tensors(tmp_path / "plain" / file)
    assert all((tensor == plain[name]).all() for name, tensor in read_tensors(watched / file).items())
    assert lines(watched, "loss")[-1]["loss"] == lines(tmp_path / "plain", "loss")[-1]["loss"]

    found = lines(watched, "validation_loss")
    assert [line["step"] for line in found] == [0, 2, 4, 6]
    assert found[0]["validation_gain"] == 0 != found[1]["validation_gain"] and len(found[0]["validation_levels"]) == 8
    for line in found:
        assert line["validation_gain"] == pytest.approx(line["validation_loss"] - found[0]["validation_loss"], abs=1e-9)
        assert line["validation_loss"] == pytest.approx(sum(line["validation_levels"]) / 8)

    best = min(found[1:], key=lambda line: line["validation_loss"])["step"]
    assert read_header(watched / "checkpoints" / "best.safetensors").metadata == {"step": str(best)}
    assert all(check["passed"] for checks in json.loads((watched / "adapter/best/verify.json").read_text()).values()
               for check in checks)

    # Killed after the checkpoint of step 4 and before all that followed from it
    shutil.rmtree(watched / "checkpoints" / "step-00000006")
    shutil.rmtree(watched / "adapter")
    kept = (watched / "metrics.jsonl").read_text()
    (watched / "metrics.jsonl").write_text("".join(
        line for line in kept.splitlines(keepends=True) if json.loads(line)["step"] < 4 or "loss" in json.loads(line)))
    assert train(recipe, watched, *given(WATCHED)) == 0
    assert [line for line in lines(watched, "validation_loss")] == found
    assert all((tensor == plain[name]).all() for name, tensor in read_tensors(watched / file).items())


def test_the_best_is_kept_before_it_is_said_and_no_other_is_handed_over(recipe, tmp_path, train, monkeypatch, capsys):
    """A kill as the parameters of the first best step are written; later, a log and a file that do not fit."""
    run, few = tmp_path / "run", [*WATCHED, "train.max_steps=2", "train.learning_rate=1e-3"]

    class Kill(BaseException):
        pass

    def kill(*args):
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(watch, "write_safetensors", kill)
        with pytest.raises(Kill):
            train(recipe, run, *given(few))
    assert train(recipe, run, *given(few)) == 0
    assert read_header(run / "checkpoints" / "best.safetensors").metadata == {"step": "2"}
    assert (run / "adapter" / "best" / "small.safetensors").is_file()
    for loss, said in ((0.0, "best.safetensors does not hold step 1"), ("NaN", "no step whose validation_loss is finite")):
        log = [f'{{"step": {step}, "validation_loss": {value}}}\n' for step, value in ((1, loss), (2, "NaN"))]
        (run / "metrics.jsonl").write_text("".join(log))
        assert train(recipe, run, *given(few)) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("losses, best, over", [
    (["NaN", 0.3, 0.2, "Infinity", 0.2], 3, True), ([0.3, "NaN"], 1, False), (["-Infinity", "NaN"], None, True)])
def test_only_what_is_finite_can_be_the_best(tmp_path, losses, best, over):
    lines = [f'{{"step": {step}, "validation_loss": {loss}}}\n' for step, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    train, one = SimpleNamespace(keep_best=True, patience=2), SimpleNamespace(is_main_process=True, num_processes=1)
    run = SimpleNamespace(folder=RunFolder(tmp_path, "x"), recipe=SimpleNamespace(train=train), accelerator=one)
    assert watch.best(run) == best and watch.over(run) == over


def test_patience(recipe, tmp_path, train, capsys):
    settings = [*WATCHED, "every.validate=1", "train.patience=1", "train.learning_rate=3", "train.clip_norm=null",
                "train.schedule=constant", "train.max_steps=40"]
    assert train(recipe, tmp_path / "run", *given(settings)) == 0
    found = lines(tmp_path / "run", "validation_loss")
    assert found[-1]["step"] < 40 and "it ends" in capsys.readouterr().err
    assert min(found[1:], key=lambda line: line["validation_loss"]) == found[-2]
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(recipe, tmp_path / "run", *given(settings)) == 0       # over is over
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log


def test_mistakes(recipe, tmp_path, capsys):
    for setting, words in (("every.validate=2", "data.validation is null"),
                           ("train.patience=2", "every.validate, which is 0")):
        assert main(["train", str(recipe), "--run", str(tmp_path / "none"), "--set", setting]) == 2
        assert words in capsys.readouterr().err
