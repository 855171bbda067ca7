"""Trackers hear what metrics.jsonl and the previews say, and change no bit of the training."""

import json

from accelerate import tracking


class Heard(tracking.GeneralTracker):
    """In place of TensorBoard, which the tests do not need."""

    name, requires_logging_directory, tracker = "tensorboard", True, None
    lines, shown = [], []

    def __init__(self, run_name, logging_dir, **kwargs):
        super().__init__()

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.lines.append({"step": step} | values)

    def log_images(self, values, step=None, **kwargs):
        self.shown.append((step, values["preview"].shape, kwargs))


def test_trackers(recipe, train, tmp_path, monkeypatch, capsys):
    words = ["--set", "every.preview=6", "--set", "preview.prompts=[a red circle]", "--set", "preview.steps=1"]
    asked = ["--set", "train.trackers=[tensorboard]"]
    monkeypatch.setattr(tracking, "_available_trackers", [])
    assert train(recipe, tmp_path / "run", *words, *asked) == 2
    assert "train.trackers: tensorboard: Accelerate knows no such tracker" in capsys.readouterr().err

    assert train(recipe, tmp_path / "plain", *words) == 0
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Heard)
    assert train(recipe, tmp_path / "run", *words, *asked) == 0
    adapters = [(tmp_path / name / "adapter" / "small.safetensors").read_bytes() for name in ("plain", "run")]
    assert adapters[0] == adapters[1]
    assert Heard.lines == [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(step, shape[0], shape[3], more) for step, shape, more in Heard.shown] == [
        (step, 1, 3, {"dataformats": "NHWC"}) for step in (0, 6)]
