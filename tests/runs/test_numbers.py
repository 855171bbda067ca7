"""A number that is not finite is never trained on, and training that does nothing is told."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from finetune.errors import FinetuneError
from finetune.train import loop, window


class Crash(BaseException):
    """Nothing in the code under test may catch this."""


def settings(**values) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def adapter(run) -> bytes:
    return (run / "adapter" / "small.safetensors").read_bytes()


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def poison(monkeypatch):
    """The loss of some steps is not finite, and before one of them the process is gone. Gives, of each step, whether the
    parameters stayed as they were."""
    with monkeypatch.context() as patch:
        yield lambda *args, **kwargs: poisoned(patch, *args, **kwargs)


def poisoned(patch, steps: set[int], crash: int = -1) -> dict[int, bool]:
    seen, real = {}, poisoned.real

    def one_step(run, step, batches):
        if step == crash:
            raise Crash
        inner = run.model.forward
        if step in steps:
            run.model.forward = lambda batch: inner(batch) * float("nan" if step % 2 else "inf")
        before = {name: p.detach().clone() for name, p in run.parameters.items()}
        result = real(run, step, batches)
        run.model.forward = inner
        seen[step] = all(torch.equal(before[name], p) for name, p in run.parameters.items())
        return result

    patch.setattr(loop, "one_step", one_step)
    return seen


poisoned.real = loop.one_step


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])       # one reads the flag on the device, one is not called
def test_a_step_that_is_not_finite_is_skipped_named_and_skipped_again(recipe, train, tmp_path, poison, optimizer, capsys):
    options = settings(train__optimizer=optimizer, train__ema="{decay: 0.9}", every__log=3)
    seen = poison({1, 4})
    assert train(recipe, tmp_path / "whole", *options) == 0
    assert seen == {step: step in (1, 4) for step in range(6)}
    skipped = [line for line in lines(tmp_path / "whole") if "skipped" in line]
    assert [line["step"] for line in skipped] == [2, 5] and all(line["why"] == "loss" for line in skipped)
    assert f"it saw {', '.join(skipped[0]['skipped'])}" in capsys.readouterr().err
    poison({1, 4}, crash=3)     # the newest checkpoint is of step 2: its window is open, and the line of step 3 is written
    with pytest.raises(Crash):
        train(recipe, tmp_path / "cut", *options)
    poison({1, 4})
    assert train(recipe, tmp_path / "cut", *options) == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert [line.get("skipped", line.get("loss")) for line in lines(tmp_path / "cut")] == \
        [line.get("skipped", line.get("loss")) for line in lines(tmp_path / "whole")]


def test_a_skipped_step_leaves_no_gradient_behind(recipe, train, tmp_path, poison):
    """In place of weights in bfloat16 the optimizer holds others, and clears the gradient of those. The lines of the log that
    then have no loss, the report does without."""
    seen = poison({1})
    assert train(recipe, tmp_path / "run", *settings(method="{kind: full, targets: [to_k]}", base__dtype="bfloat16",
                                                     train__max_steps=3, every__log=1)) == 0
    assert seen == {0: False, 1: True, 2: False}
    poison({0})
    assert train(recipe, tmp_path / "first", *settings(train__max_steps=2, every__log=1)) == 0
    assert lines(tmp_path / "first")[-2]["loss"] is None and (tmp_path / "first" / "report.html").is_file()


def test_many_in_a_row_end_the_run_with_the_state_before_them(recipe, train, tmp_path, poison, capsys):
    poison(set(range(3, 40)))
    assert train(recipe, tmp_path / "run", *settings(train__max_steps=40, every__checkpoint=0)) == 2
    assert "step 14: 10 steps in a row were not finite" in capsys.readouterr().err      # seen at the next line
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000014"]
    assert not list((tmp_path / "run" / "adapter").iterdir())


@pytest.mark.parametrize("scaler, losses, norms, ends, named", [
    (None, "f" + 10 * "n" + "fff", 14 * "f", True, 10),            # sound steps behind them, within one line
    (None, 2 * ("f" + 9 * "n"), 20 * "f", False, 18),
    (1, 60 * "f", "n" + "f" + 40 * "n" + "f" + 17 * "n", False, 0),     # float16 looks for its scale
    (1, 60 * "f", 10 * "f" + 50 * "n", True, 10),                  # and does not find one
    (1, "f" + 10 * "n" + "f", "f" + 10 * "n" + "f", True, 10)])
@pytest.mark.parametrize("cut", [0, 7])
def test_what_is_counted_between_two_lines(monkeypatch, scaler, losses, norms, ends, named, cut):
    """No GPU, so no scaler: of float16 the window alone. A resumed run says the same."""
    lines, value = [], {"f": 1.0, "n": float("nan")}
    monkeypatch.setattr(window, "write", lambda run, line: lines.append(line))
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, scaler=scaler, num_processes=1)
    run = SimpleNamespace(accelerator=accelerator, optimizer=SimpleNamespace(param_groups=[{"lr": 1}]), say=lambda line: None,
                          loader=SimpleNamespace(streams=[]))
    counted = window.Window(run)
    for done, (loss, norm) in enumerate(zip(losses, norms), 1):
        counted.add(torch.tensor(value[loss]), torch.tensor(value[norm]), 1)
        if done == cut:
            counted = window.Window(run, **counted.values())
        if done % 20 == 0 or done == len(losses):
            counted.close(done)
    assert sum("skipped" in line for line in lines) == named
    with pytest.raises(FinetuneError, match="10 steps in a row") if ends else nullcontext():
        counted.check(done)


def test_a_rate_that_moves_nothing_is_told(recipe, train, tmp_path, capsys):
    assert train(recipe, tmp_path / "run", *settings(train__learning_rate="1e-30", train__max_steps=2)) == 0
    assert "ALARM after 2 steps: the loss is the base's to the last bit" in capsys.readouterr().err
    assert "alarm" in lines(tmp_path / "run")[-1]


def test_latents_that_are_not_finite_name_their_file(recipe, train, tmp_path, monkeypatch, capsys):
    from finetune.families import _unet

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    real = _unet.UNetFamily.moments
    monkeypatch.setattr(_unet.UNetFamily, "moments", lambda self, x: real(self, x) / 0)
    assert train(recipe, tmp_path / "run") == 2
    assert "0.png: the VAE gives latents that are not finite" in capsys.readouterr().err
