"""Whole runs over everything that data can be: sources, buckets, masks, class pictures, held-out pictures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from finetune.artifact import read_tensors
from finetune.diffusion import timesteps
from finetune.recipe import load
from finetune.train import ground

SHAPES = [(40, 40), (64, 36), (36, 64), (60, 40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def drawn(folder: Path, count: int, colour: str, masks: Path | None = None) -> Path:
    folder.mkdir()
    for i in range(count):
        image = Image.new("RGB", SHAPES[i % 4], "white")
        ImageDraw.Draw(image).ellipse([4, 4, 20 + i, 28], fill=colour)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} circle, round, big, on white, {i}")
        if masks:
            masks.mkdir(exist_ok=True)
            mask = Image.new("L", image.size, 0)
            ImageDraw.Draw(mask).ellipse([4, 4, 20 + i, 28], fill=255)
            mask.save(masks / f"{i}.png")
    return folder


@pytest.fixture
def everything(tmp_path) -> Path:
    """A recipe with all of it on; what is drawn anew at every draw makes the text encoder run in the loop."""
    path, masks = tmp_path / "all.yaml", tmp_path / "masks"
    one, other = drawn(tmp_path / "red", 7, "red", masks), drawn(tmp_path / "blue", 4, "blue", masks)
    for file in list(one.iterdir()):        # the masks of two sources lie in one folder
        file.rename(file.with_name(f"r{file.name}"))
    for file in list(masks.iterdir()):
        shutil.copy(file, file.with_name(f"r{file.name}"))
    path.write_text(f"""
base: {{path: tiny}}
data:
  images: [{{path: "{one}", repeats: 2}}, "{other}"]
  resolution: 32
  buckets: {{step: 8}}
  flip: true
  caption: {{template: ["{{text}}", {{template: "a picture of {{text}}", weight: 0.5}}], trigger: sks,
            tags: {{shuffle: true, keep: 1, dropout: 0.2}}, dropout: 0.1}}
  mask: {{source: "{masks}", unmasked_weight: 0.1}}
  prior: {{prompt: a green circle on white, count: 3, weight: 0.5, steps: 2, guidance: 1}}
  validation: {{fraction: 0.2}}
method: {{kind: lora, rank: 2}}
train: {{max_steps: 6, batch_size: 4, learning_rate: 1e-2, threads: 1}}
every: {{log: 1, checkpoint: 3}}
""")
    return path


def adapter(run: Path) -> dict:
    return read_tensors(next((run / "adapter").glob("*.safetensors")))


def relative(a: dict, b: dict) -> float:
    a, b = (torch.cat([d[k].flatten() for k in sorted(d)]) for d in (a, b))
    return ((a - b).norm() / b.norm()).item()


def test_splits_processes_and_workers_train_the_same(everything, train, train_by_two, tmp_path):
    assert train(everything, tmp_path / "one", "--set", "data.workers=0") == 0
    said = (tmp_path / "one" / "log.txt").read_text()
    assert "9 pictures" in said and "prior     3 class pictures" in said and "held out  2" in said and "buckets" in said
    assert train(everything, tmp_path / "threads", "--set", "data.workers=4") == 0
    assert all(torch.equal(t, adapter(tmp_path / "one")[name]) for name, t in adapter(tmp_path / "threads").items())
    assert train(everything, tmp_path / "split", "--set", "train.batch_size=1", "--set", "train.gradient_accumulation=4") == 0
    assert relative(adapter(tmp_path / "split"), adapter(tmp_path / "one")) <= 1e-4
    train_by_two(everything, tmp_path / "two", "--set", "train.batch_size=2")
    assert relative(adapter(tmp_path / "two"), adapter(tmp_path / "one")) <= 1e-4


def test_it_goes_on_bit_for_bit(everything, train, tmp_path):
    assert train(everything, tmp_path / "whole") == 0
    assert train(everything, tmp_path / "cut") == 0
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    next((tmp_path / "cut" / "adapter").glob("*.safetensors")).unlink()
    assert train(everything, tmp_path / "cut") == 0
    assert all(torch.equal(t, adapter(tmp_path / "whole")[name]) for name, t in adapter(tmp_path / "cut").items())
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    assert [json.loads(line)["loss"] for line in lines[0]] == [json.loads(line)["loss"] for line in lines[1]]


def test_class_pictures_are_made_once_and_the_missing_ones_alone(everything, train, tmp_path, monkeypatch):
    from finetune.train import prior

    made, real = [], prior.generate
    monkeypatch.setattr(prior, "generate", lambda pipeline, jobs, *rest, **more: made.append(len(jobs)) or real(
        pipeline, jobs, *rest, **more))
    assert train(everything, tmp_path / "a", "--set", "train.max_steps=1") == 0
    kept = {file.name: file.read_bytes() for file in (tmp_path / "cache" / "class").rglob("*.png")}
    assert train(everything, tmp_path / "b", "--set", "train.max_steps=1") == 0
    assert train(everything, tmp_path / "c", "--set", "train.max_steps=1", "--set", "data.prior.count=4") == 0
    next((tmp_path / "cache" / "class").rglob("000001.png")).unlink()
    assert train(everything, tmp_path / "d", "--set", "train.max_steps=1") == 0
    assert made == [3, 0, 1, 1]
    now = {file.name: file.read_bytes() for file in (tmp_path / "cache" / "class").rglob("*.png")}
    assert now == kept | {"000003.png": now["000003.png"]}      # each from its own seed, whoever is made beside it
    own = drawn(tmp_path / "class", 2, "green")
    assert train(everything, tmp_path / "e", "--set", "train.max_steps=1", "--set", f"data.prior.images={own}") == 0
    assert made == [3, 0, 1, 1, 0]      # two are there, and the third was made before
    assert "prior     3 class pictures" in (tmp_path / "e" / "log.txt").read_text()


@pytest.mark.parametrize("size", [3, 4, 7])
def test_class_pictures_share_out_the_noise_levels_of_a_step_too(everything, size):
    recipe = load(everything).recipe
    stream = ground.stream(recipe, 8, size, ground.found(recipe, "learn", print, True), "class")
    for step in range(5):
        drawn = timesteps.draw(0, [stream.first + step * size + slot for slot in range(size)], size)
        assert sorted((drawn * size).int().tolist()) == [*range(size)]


def test_an_edited_picture_is_another_run(everything, train, tmp_path, capsys):
    assert train(everything, tmp_path / "run", "--set", "train.max_steps=1") == 0
    Image.new("RGB", (40, 40), "black").save(tmp_path / "red" / "r0.png")
    assert train(everything, tmp_path / "run", "--set", "train.max_steps=1") == 2
    assert "data:" in capsys.readouterr().err


def test_random_crops_of_buckets_with_their_masks(everything, train, tmp_path, capsys):
    assert train(everything, tmp_path / "run", "--set", "data.crop=random", "--set", "train.max_steps=2") == 0
    Image.new("L", Image.open(tmp_path / "masks" / "r0.png").size).save(tmp_path / "masks" / "r0.png")
    options = ["--set", "data.crop=random", "--set", "data.mask.unmasked_weight=0"]
    assert train(everything, tmp_path / "other", *options) == 2
    assert "r0.png: its mask leaves nothing to train" in capsys.readouterr().err
