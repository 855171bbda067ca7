"""Kill a run anywhere, give the same command again: the adapter is byte for byte what it would have been."""

import json
import os
import shutil
import signal

import pytest
import torch

from finetune.disk import write_json
from finetune.runfolder import RunFolder
from finetune.train import checkpoint, lean, loop


def settings(**values) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def adapter(run) -> bytes:
    return (run / "adapter" / "small.safetensors").read_bytes()


def trained(run) -> list:
    return [{k: json.loads(line)[k] for k in ("step", "loss", "grad_norm", "lr")}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


class Crash(BaseException):
    """Nothing in the code under test may catch this."""


def crash_before(monkeypatch, step: int, action):
    real = loop.one_step

    def one_step(run, at, batches):
        if at == step:
            monkeypatch.setattr(loop, "one_step", real)
            action()
        return real(run, at, batches)

    monkeypatch.setattr(loop, "one_step", one_step)


def crash():
    raise Crash


@pytest.mark.parametrize("options", [{}, {"train__optimizer": "adamw8bit", "train__ema": "{decay: 0.9}"}],
                         ids=["adamw", "adamw8bit+ema"])
def test_a_crashed_run_ends_with_the_same_bytes(recipe, train, tmp_path, monkeypatch, options):
    options = settings(**options)
    assert train(recipe, tmp_path / "whole", *options) == 0
    for step in (5, 3):     # between checkpoints, and again after the first resume
        crash_before(monkeypatch, step, crash)
        with pytest.raises(Crash):
            train(recipe, tmp_path / f"cut{step}", *options)
        assert not (tmp_path / f"cut{step}" / "adapter" / "small.safetensors").exists()
        assert train(recipe, tmp_path / f"cut{step}", *options) == 0
        assert adapter(tmp_path / f"cut{step}") == adapter(tmp_path / "whole")
        assert trained(tmp_path / f"cut{step}") == trained(tmp_path / "whole")


def test_a_run_by_onednn_that_computes_twice_goes_on_exactly(recipe, train, tmp_path, monkeypatch):
    """As a base of full size does, whose layers are large enough for it."""
    monkeypatch.setattr(lean, "LARGE", 1)
    monkeypatch.setattr(lean, "WORTH", 1)
    options, products = settings(train__gradient_checkpointing="selective"), []
    apply = lean.Product.apply
    monkeypatch.setattr(lean.Product, "apply", lambda *x: products.append(1) or apply(*x))
    assert train(recipe, tmp_path / "whole", *options) == 0 and products
    crash_before(monkeypatch, 5, crash)
    with pytest.raises(Crash):
        train(recipe, tmp_path / "cut", *options)
    assert train(recipe, tmp_path / "cut", *options) == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole") and trained(tmp_path / "cut") == trained(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["lion", "lion8bit", "adafactor", "prodigy", "schedule_free_adamw", "sgd"])
def test_a_crashed_run_of_another_optimizer_too(recipe, train, tmp_path, monkeypatch, optimizer):
    schedule = "constant" if optimizer == "schedule_free_adamw" else "{kind: wsd, decay: 0.5, floor: 0.1}"
    options = settings(train__optimizer=optimizer, train__max_steps=4, train__schedule=schedule,
                       train__learning_rate=1.0 if optimizer == "prodigy" else 1e-2)
    assert train(recipe, tmp_path / "whole", *options) == 0
    crash_before(monkeypatch, 3, crash)
    with pytest.raises(Crash):
        train(recipe, tmp_path / "cut", *options)
    assert train(recipe, tmp_path / "cut", *options) == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_running_step(recipe, train, tmp_path, monkeypatch, number, code):
    assert train(recipe, tmp_path / "whole") == 0
    crash_before(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    assert train(recipe, tmp_path / "cut") == code
    assert (tmp_path / "cut" / "checkpoints" / "step-00000003").is_dir()
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')          # as a kill in the middle of a write would leave it
    assert train(recipe, tmp_path / "cut") == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


def test_a_second_start_is_refused(recipe, train, tmp_path, capsys):
    from finetune.runfolder import RunFolder

    assert train(recipe, tmp_path / "run") == 0
    other = RunFolder(tmp_path / "run", "small")
    other.lock()
    for extra in ([], ["--fresh"]):
        assert train(recipe, tmp_path / "run", *extra) == 2
        assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    other._lock.release()           # as the end of that process would
    assert train(recipe, tmp_path / "run") == 0


def test_a_damaged_checkpoint_is_named_set_aside_and_not_used(recipe, train, tmp_path, monkeypatch, capsys):
    assert train(recipe, tmp_path / "whole") == 0
    crash_before(monkeypatch, 5, crash)
    with pytest.raises(Crash):
        train(recipe, tmp_path / "cut")
    victim = tmp_path / "cut" / "checkpoints" / "step-00000004" / "parameters.safetensors"
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    assert train(recipe, tmp_path / "cut") == 0
    assert "step-00000004 is damaged" in capsys.readouterr().err
    assert (tmp_path / "cut" / "checkpoints" / "damaged-step-00000004").is_dir()
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


@pytest.mark.parametrize("manifest", [
    "[]", "5", "[" * 10**5, '{"step": 1}', '{"step": 1, "files": {}}', '{"step": 1, "files": []}', '{"step": 2, "files": {}}',
    '{"step": 1, "files": {"parameters.safetensors": 0}}'])
def test_a_manifest_that_is_none_is_damage(tmp_path, manifest):
    folder, said = RunFolder(tmp_path / "run", "x"), []
    checkpoint.save(folder, checkpoint.State(1, {"a": torch.ones(2)}, {}, {}, None), 2)
    assert checkpoint.newest(folder, said.append, tidy=True).parameters["a"].tolist() == [1, 1] and not said
    (folder.checkpoint(1) / checkpoint.MANIFEST).write_text(manifest)
    assert checkpoint.newest(folder, said.append, tidy=True) is None
    assert "step-00000001 is damaged" in said[0] and (folder.checkpoints / "damaged-step-00000001").is_dir()


def test_a_checkpoint_of_another_run_is_not_used(tmp_path):
    said, one, other = [], RunFolder(tmp_path / "one", "x"), RunFolder(tmp_path / "other", "x")
    for folder in (one, other):
        folder.root.mkdir()
        train = {"max_steps": 1, "batch_size": 1, "gradient_accumulation": 1, "seed": folder.root.name}
        exact = {"recipe": {"train": train}, "data": "", "base": {}, "processes": 1, "device": "cpu"}
        write_json(folder.identity, {"exact": exact, "rounding": {}})
        checkpoint.save(folder, checkpoint.State(1, {"a": torch.ones(2)}, {}, {}, None), 2)
        assert checkpoint.newest(folder, said.append, tidy=True) and not said
    shutil.rmtree(one.checkpoint(1))
    shutil.copytree(other.checkpoint(1), one.checkpoint(1))
    assert checkpoint.newest(one, said.append, tidy=True) is None and "it is of another run" in said[0]


def test_a_failed_save_keeps_the_last_checkpoint(recipe, train, tmp_path, monkeypatch, capsys):
    real = checkpoint.write_safetensors

    def full(path, tensors, metadata):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    assert train(recipe, tmp_path / "run") == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "write_safetensors", real)
    assert train(recipe, tmp_path / "run") == 0
    assert train(recipe, tmp_path / "whole") == 0
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_only_the_last_checkpoints_stay(recipe, train, tmp_path):
    assert train(recipe, tmp_path / "run") == 0
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_a_finished_run_is_left_as_it_is(recipe, train, tmp_path):
    assert train(recipe, tmp_path / "run") == 0
    before, log = adapter(tmp_path / "run"), trained(tmp_path / "run")
    assert train(recipe, tmp_path / "run") == 0
    assert adapter(tmp_path / "run") == before and trained(tmp_path / "run") == log


def test_a_changed_recipe_is_refused_with_the_difference(recipe, train, tmp_path, capsys):
    assert train(recipe, tmp_path / "run") == 0
    before = adapter(tmp_path / "run")
    assert train(recipe, tmp_path / "run", *settings(train__learning_rate="3e-3", method__rank=4)) == 2
    said = capsys.readouterr().err
    assert "train.learning_rate: 0.01 -> 0.003" in said and "rank: 2 -> 4" in said and "--fresh" in said
    assert adapter(tmp_path / "run") == before
    assert train(recipe, tmp_path / "run", "--fresh", *settings(train__learning_rate="3e-3")) == 0
    assert adapter(tmp_path / "run.old-1") == before != adapter(tmp_path / "run")


def test_edited_pictures_are_another_run(recipe, train, tmp_path, pictures, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    assert train(recipe, tmp_path / "run") == 0
    assert train(recipe, tmp_path / "run", *settings(data__images=copy)) == 0      # the same pictures elsewhere
    rows = (copy / "metadata.jsonl").read_text().replace("red", "crimson").replace("6.png", "new.png")
    (copy / "metadata.jsonl").write_text(rows)
    (copy / "6.png").rename(copy / "new.png")
    assert train(recipe, tmp_path / "run", *settings(data__images=copy)) == 2
    told = [line.strip() for line in capsys.readouterr().err.splitlines() if line.startswith("    data:")]
    assert told == [f"data: of what is learned, 1 changed: {copy}/0.png (what is written beside it)",
                    f"data: of what is learned, 1 missing now: {copy}/6.png", f"data: of what is learned, 1 new: {copy}/new.png"]
    (tmp_path / "run" / "data.parquet").write_bytes(b"PAR1" * 9)
    assert train(recipe, tmp_path / "run", *settings(data__images=copy)) == 2
    assert "which pictures cannot be told" in capsys.readouterr().err


def test_a_run_continues_from_its_own_copy_of_the_recipe(recipe, train, tmp_path):
    assert train(recipe, tmp_path / "run") == 0
    given = (tmp_path / "run" / "recipe.yaml").read_text()
    assert given == recipe.read_text()
    for extra in ([], ["--fresh"]):
        assert train(tmp_path / "run" / "recipe.yaml", tmp_path / "run", *extra) == 0
        assert (tmp_path / "run" / "recipe.yaml").read_text() == given


def test_a_folder_of_something_else_is_left_alone(recipe, train, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("precious")
    for extra in ([], ["--fresh"]):
        assert train(recipe, tmp_path / "mine", *extra) == 2
        assert "no run of ours" in capsys.readouterr().err
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() == "precious"
