"""Whole runs that learn tokens."""

import json
import shutil

import pytest
import torch
from PIL import Image

from finetune.artifact import read_tensors
from finetune.cli import main
from finetune.commands import train as command
from finetune.train import loop


def words(*methods: dict, **more) -> list[str]:
    settings = {"method": json.dumps(methods), "train.max_steps": 4, "train.learning_rate": 1e-2} | more
    return [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]


TOKEN = {"kind": "embedding", "tokens": {"sks-disc": {"init": "circle", "vectors": 2}, "colour": "per_value"}}
TEMPLATE = {"data.caption.template": '"a {colour} sks-disc on white"'}
LORA = {"kind": "lora", "rank": 2, "text": {}, "learning_rate": 1e-3}


@pytest.fixture
def coloured(recipe, pictures, tmp_path):
    """The recipe, with pictures that have a column for the colour."""
    folder = tmp_path / "coloured"
    shutil.copytree(pictures, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"colour": row["text"].split()[1]} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(recipe.read_text().replace(str(pictures), str(folder)))
    return recipe


@pytest.mark.parametrize("methods", [(TOKEN,), ({**TOKEN, "until": 0.5}, LORA)], ids=["alone", "with a lora"])
def test_a_run_is_proven_and_goes_on_bit_for_bit(coloured, train, tmp_path, methods):
    whole, cut, orders = tmp_path / "whole", tmp_path / "cut", words(*methods, **TEMPLATE)
    assert train(coloured, whole, *orders) == 0
    files = {path.name: path.read_bytes() for path in (whole / "adapter").glob("*.safetensors")}
    tokens = {f"colour-{colour}" for colour in ("red", "orange", "yellow", "green", "cyan", "blue", "purple")} | {"sks-disc"}
    assert {name.removesuffix(".safetensors") for name in files} == tokens | ({"small"} if len(methods) > 1 else set())
    proof = json.loads((whole / "adapter" / "verify.json").read_text())["sks-disc.safetensors"]
    assert [check["name"] for check in proof] == ["metadata", "finite", "not zero", "fits the base", "length", "moved",
                                                  "prompts in diffusers", "tools"]
    assert len(files["colour-red.safetensors"]) < 10_000
    assert read_tensors(whole / "adapter" / "sks-disc.safetensors")["emb_params"].shape == (2, 128)

    assert train(coloured, cut, *orders) == 0
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    for path in (cut / "adapter").iterdir():
        path.unlink()
    assert train(coloured, cut, *orders) == 0
    assert {path.name: path.read_bytes() for path in (cut / "adapter").glob("*.safetensors")} == files


@pytest.mark.parametrize("more", [
    {"train.optimizer": "schedule_free_adamw"}, {"train.optimizer": "prodigy", "train.learning_rate": 1},
    {"train.gradient_release": "true"}], ids=["schedule-free", "prodigy", "released"])
def test_what_is_past_its_end_stays_as_it_is(coloured, train, tmp_path, monkeypatch, more):
    """And takes no part in the norm that the other method's gradient is clipped by."""
    norms, apply, released = [], loop.apply, "train.gradient_release" in more

    def seen(run, norm):
        norms.append((norm, sum(p.grad.square().sum() for p in run.parameters.values() if p.grad is not None) ** 0.5,
                      {name.startswith("denoiser") for name, p in run.parameters.items() if p.grad is not None}))
        apply(run, norm)

    monkeypatch.setattr(loop, "apply", seen)
    monkeypatch.setattr(command, "hand_over", lambda run: None)
    lora = {"kind": "lora", "rank": 2, "until": 0.5, "max_norm": 1e-3}
    orders = words(lora, TOKEN, **TEMPLATE, **{"train.clip_norm": "null", "train.gradient_accumulation": 1,
                                               "train.schedule": "constant"}, **more)
    assert train(coloured, tmp_path / "run", *orders) == 0
    half, end = (read_tensors(tmp_path / "run" / "checkpoints" / f"step-0000000{done}" / "parameters.safetensors")
                 for done in (2, 4))
    rests = {name: torch.equal(end[name], value) for name, value in half.items()}
    assert all(rest for name, rest in rests.items() if name.startswith("denoiser")) and not all(rests.values())
    if not released:
        assert [both for *_, both in norms] == 2 * [{True, False}] + 2 * [{False}]
        assert all(norm == pytest.approx(found.item(), rel=1e-5) for norm, found, _ in norms)


def test_a_token_that_no_caption_names_is_refused(coloured, train, tmp_path, capsys):
    for template, why in (('"a {colour} disc"', "sks-disc is in no caption"),
                          ("a sks-disc", "purple and 2 more are in no caption")):
        assert train(coloured, tmp_path / "run", *words(TOKEN, **{"data.caption.template": template})) == 2
        assert "method.tokens: " in (said := capsys.readouterr().err) and why in said
    assert train(coloured, tmp_path / "run", *words({"kind": "embedding", "tokens": {"shape": "per_value"}})) == 2
    assert "no picture has a column 'shape'; columns: colour, text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sampling_with_a_token_and_what_is_refused(coloured, train, tmp_path, capsys):
    assert train(coloured, tmp_path / "run", *words(TOKEN, **TEMPLATE, **{"train.max_steps": 2})) == 0
    token = tmp_path / "run" / "adapter" / "sks-disc.safetensors"
    sample = ["sample", "--base", "tiny", "--prompt", "a sks-disc", "--steps", "2", "--out"]
    assert main([*sample, str(tmp_path / "with"), "--adapter", str(token), "--strengths", "0,1"]) == 0
    assert main([*sample, str(tmp_path / "without")]) == 0
    base, learned = sorted((tmp_path / "with").iterdir())
    pixels = {path: Image.open(path).tobytes() for path in (base, learned, next((tmp_path / "without").iterdir()))}
    assert len(set(pixels.values())) == 2 and pixels[base] != pixels[learned]
    assert main([*sample, str(tmp_path / "x"), "--adapter", f"{token}:0.5"]) == 2
    assert "a learned token has no strength" in capsys.readouterr().err
    assert main(["merge", "--base", "tiny", "--adapter", str(token), "--out", str(tmp_path / "merged")]) == 2
    assert "cannot be merged into weights" in capsys.readouterr().err
    assert main(["verify", str(token), "--base", "tiny"]) == 0
    assert main(["convert", str(token), "--to", "diffusers", "--out", str(tmp_path / "sks-disc.diffusers.safetensors")]) == 0
    assert main(["verify", str(tmp_path / "sks-disc.diffusers.safetensors"), "--base", "tiny"]) == 0
    assert main(["inspect", str(token)]) == 0 and "embedding" in capsys.readouterr().out


def test_two_processes_train_the_same_as_one(coloured, train, train_by_two, tmp_path):
    sgd = {"train.optimizer": "sgd", "train.learning_rate": 1.0}       # Adam enlarges rounding
    orders = words(TOKEN, **TEMPLATE, **sgd)
    assert train(coloured, tmp_path / "one", *orders, "--set", "train.batch_size=4") == 0
    train_by_two(coloured, tmp_path / "two", *orders)
    one, two = (read_tensors(tmp_path / name / "adapter" / "sks-disc.safetensors")["emb_params"] for name in ("one", "two"))
    assert (one - two).norm() <= 1e-5 * one.norm()
