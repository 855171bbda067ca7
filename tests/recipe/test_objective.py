"""The words of the loss."""

from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.recipe import dump, load

SMALLEST = "base: {path: tiny}\ndata: {images: pictures}\nmethod: {kind: lora}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "dog.yaml") -> str:
        (tmp_path / name).write_text(SMALLEST + f"objective: {text}", encoding="utf-8")
        return name

    return write


@pytest.mark.parametrize("text, key, expected", [
    ("{timesteps: cosmap}", "timesteps", {"kind": "cosmap"}),
    ("{timesteps: {kind: logit_normal, mean: 0, scale: 1, min: 0.0, max: 1.0, stratified: true}}", "timesteps",
     {"kind": "logit_normal", "mean": 0, "scale": 1, "stratified": True}),
    ("{timesteps: mode}", "timesteps", {"kind": "mode", "scale": 1.29}),
    ("{timesteps: {kind: log_normal, scale: 0.6}, path: edm}", "timesteps",
     {"kind": "log_normal", "mean": -1.2, "scale": 0.6}),
    ("{weighting: p2}", "weighting", {"kind": "p2", "gamma": 1.0, "k": 1.0}),
    ("{weighting: soft_min_snr}", "weighting", {"kind": "soft_min_snr", "gamma": 5.0}),
    ("{path: {kind: rf, shift: 3.0}}", "path", {"kind": "rf", "shift": 3.0}),
    ("{path: {kind: edm}}", "path", {"kind": "edm", "sigma_data": 0.5}),
    ("{path: {kind: ddpm, schedule: cosine, prediction: v_prediction, zero_snr: true}}", "path",
     {"kind": "ddpm", "schedule": "cosine", "beta_start": 0.00085, "beta_end": 0.012,
      "prediction": "v_prediction", "zero_snr": True}),
    ("{loss: {kind: huber, c: 0.1, schedule: snr}}", "loss", {"kind": "huber", "c": 0.1, "schedule": "snr"}),
    ("{noise: {offset: 0.05}}", "noise", {"offset": 0.05, "offset_random": False, "pyramid": 0.0, "perturbation": 0.0}),
])
def test_words_and_what_is_left_out(write, text, key, expected):
    recipe = load(write(text)).recipe
    found = getattr(recipe.objective, key).model_dump(exclude_none=True)
    ranges = {"min": 0.0, "max": 1.0, "stratified": False} if key == "timesteps" else {}
    assert found == ranges | expected
    Path("resolved.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load("resolved.yaml").recipe == recipe


@pytest.mark.parametrize("text, expected", [
    ("{timesteps: unifrom}", "objective.timesteps.kind: unknown kind 'unifrom'; did you mean 'uniform'?"),
    ("{timesteps: {mean: 1}}",
     "objective.timesteps.mean: is of logit_normal, log_normal, and the kind is uniform; leave it out"),
    ("{timesteps: {kind: mode, scale: 2}}", "objective.timesteps.scale: wants -1 to 1.75 for mode; given 2"),
    ("{timesteps: {kind: sigmoid, scale: 0}}", "objective.timesteps.scale: wants more than 0; given 0"),
    ("{timesteps: {min: 0.5, max: 0.5}}", "objective.timesteps.max: wants more than min, which is 0.5; given 0.5"),
    ("{timesteps: {max: 1.5}}", "objective.timesteps.max: wants at most 1; given 1.5"),
    ("{timesteps: log_normal}", "objective.timesteps: log_normal is a law of σ, which the path edm has; take logit_normal"),
    ("{timesteps: 500}", "objective.timesteps: wants a mapping of kind, mean, scale"),
    ("{weighting: {gamma: 3}}", "objective.weighting.gamma: is of min_snr, soft_min_snr, p2, and the kind is uniform"),
    ("{path: flow}", "objective.path.kind: unknown kind 'flow'\n    one of: ddpm, rf, edm"),
    ("{path: {kind: ddpm, schedule: cos}}",
     "objective.path.schedule: unknown schedule 'cos'; did you mean 'cosine'?\n    one of: linear, scaled_linear, cosine"),
    ("{path: {shift: 3.0}}", "objective.path.kind: missing"),
    ("{path: {kind: rf, zero_snr: true}}", "objective.path.zero_snr: is of ddpm, and the kind is rf; leave it out"),
    ("{path: {kind: ddpm, zero_snr: true}}", "objective.path.zero_snr: at zero SNR the picture is all noise"),
    ("{path: {kind: ddpm, beta_start: 0}}", "objective.path.beta_start: wants more than 0; given 0"),
    ("{path: {kind: ddpm, beta_start: 0.9, beta_end: 0.1}}",
     "objective.path.beta_end: wants at least beta_start, which is 0.9; given 0.1"),
    ("{path: {kind: ddpm, schedule: cosine, beta_start: 0.1}}", "objective.path.beta_start: cosine has no betas of its own"),
    ("{noise: {offset_random: true}}", "objective.noise.offset_random: goes with offset"),
    ("{noise: {offest: 0.1}}", "objective.noise.offest: unknown key; did you mean 'offset'?"),
    ("{noise: {pyramid: 1}}", "objective.noise.pyramid: wants less than 1; given 1"),
    ("{loss: {c: 0.1}}", "objective.loss.c: is of huber, and the kind is l2; leave it out"),
])
def test_one_mistake(write, text, expected):
    with pytest.raises(FinetuneError) as caught:
        load(write(text))
    said = str(caught.value)
    assert said.startswith("dog.yaml:4  ") and expected in said, said
    assert said.count("dog.yaml:") == 1, "one mistake is told once"
