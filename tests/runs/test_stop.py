"""A run can be asked to stop at any time, and moved; it ends as if nothing had been."""

import json
import os
import signal

import pytest

from finetune.data import encode
from finetune.train import export, loop


def settings(**values) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def adapter(run) -> bytes:
    return (run / "adapter" / "small.safetensors").read_bytes()


@pytest.fixture
def interrupted(monkeypatch, train):
    """A run to which the signal comes when it calls `module.name`: its exit code."""
    def call(module, name: str, number: int, *arguments) -> int:
        real, sent = getattr(module, name), []

        def action(*args, **kwargs):
            if not sent:        # pictures are encoded by several threads, and a second signal ends the process
                sent.append(os.kill(os.getpid(), number))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, action)
            try:
                return train(*arguments)
            except SystemExit as end:
                return end.code

    return call


def test_a_stop_in_every_phase_a_time_budget_and_a_move(recipe, train, interrupted, tmp_path, monkeypatch):
    preview = settings(every__preview=3, preview__prompts="[a red circle]", preview__steps=2, train__keep_checkpoints=1,
                       train__keep_every=4)
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    assert train(recipe, tmp_path / "whole", *preview) == 0
    assert [p.name[-1] for p in sorted((tmp_path / "whole" / "checkpoints").iterdir())] == ["4", "6"]

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        assert interrupted(encode, "view_pixels", number, recipe, run, *preview) == code
    assert not run.exists()
    assert interrupted(loop.preview, "generate", signal.SIGTERM, recipe, run, *preview) == 143         # before the first step
    assert not list((run / "previews").iterdir())
    assert train(recipe, run, *preview, *settings(train__max_time="0s", every__preview=0)) == 143
    assert [p.name[-1] for p in (run / "checkpoints").iterdir()] == ["1"]
    run.rename(tmp_path / "there")
    moved.parent.mkdir()
    (tmp_path / "there").rename(moved)
    real = loop.show

    def third(of, done, stop):
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)
        real(of, done, stop)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "show", third)
        assert train(recipe, moved, *preview) == 130
    assert [p.name[-1] for p in (moved / "checkpoints").iterdir()] == ["3"]
    assert interrupted(export, "prove", signal.SIGTERM, recipe, moved, *preview) == 143
    assert train(recipe, moved, *preview) == 0
    assert adapter(moved) == adapter(tmp_path / "whole")
    assert sorted(p.name for p in (moved / "previews").iterdir()) == ["step-00000003.png", "step-00000006.png"]


def test_what_only_rounds_differently_is_said_once(recipe, train, tmp_path, capsys):
    short = settings(train__max_steps=2)
    assert train(recipe, tmp_path / "run", *short) == 0
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    identity["rounding"] |= {"code": "other", "torch": "1.0"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(identity))
    for times in (1, 0):
        capsys.readouterr()
        assert train(recipe, tmp_path / "run", *short) == 0
        assert capsys.readouterr().err.count("torch: 1.0 ->") == times
    (tmp_path / "run" / "run.json").write_text("{")
    assert train(recipe, tmp_path / "run", *short) == 2
    assert "run.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text, seconds", [("3h", 10800), ("1h30m", 5400), ("90s", 90), ("", None), ("3", None), ("3d", None)])
def test_a_time_is_hours_minutes_and_seconds(text, seconds):
    from pydantic import ValidationError

    from finetune.recipe.train import Train

    if seconds:
        assert Train(max_time=text).seconds == seconds
    else:
        with pytest.raises(ValidationError):
            Train(max_time=text)
