"""From a folder of pictures to a recipe that trains."""

import json
import shutil
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.families._source import TINY
from finetune.recipe import load

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["train.max_steps=2", "train.warmup_steps=0", "train.batch_size=1", "every.preview=0", "train.threads=1"]


@pytest.mark.parametrize("dataset", ["style", "subject", "attributes", "texture"])
def test_it_passes_lint(dataset, tmp_path, capsys):
    out = tmp_path / "my recipe.yaml"
    assert main(["new", str(ROOT / "datasets" / dataset), "--base", "tiny", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "cannot be trained" not in shown and shown.endswith(f"accelerate launch -m finetune train '{out}'\n")
    assert out.read_text().startswith(f"# accelerate launch -m finetune train '{out}'\n")
    recipe = load(out, []).recipe
    assert recipe.data.resolution == 64 and 300 <= recipe.train.max_steps <= 3000
    assert main(["new", str(ROOT / "datasets" / dataset), "--base", "tiny", "--out", str(out)]) == 2      # never over another


@pytest.mark.parametrize("goal", ["style", "subject", "concept"])
def test_it_trains(goal, tmp_path, pictures, train):
    folder = tmp_path / 'My "dog"'           # no captions; a name that YAML and tokenizers mind
    folder.mkdir()
    for i in range(3):
        shutil.copy(pictures / f"{i}.png", folder)
    out = tmp_path / "recipe.yaml"
    assert main(["new", str(folder), "--base", "tiny", "--goal", goal, "--class", "dog", "--out", str(out)]) == 0
    settings = SMALL + (["data.prior.count=1", "data.prior.steps=1"] if goal == "subject" else [])
    assert train(out, tmp_path / "run", *(word for setting in settings for word in ("--set", setting))) == 0


def test_memory_decides_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)       # lint looks for the base

    def batch(vram: str) -> tuple[int, bool]:
        out = tmp_path / f"{vram}.yaml"
        main(["new", str(ROOT / "datasets" / "style"), "--base", "sd15", "--vram", vram, "--out", str(out)])
        train = load(out, []).recipe.train
        assert train.batch_size * train.gradient_accumulation >= 4
        return train.batch_size, train.gradient_checkpointing

    assert batch("4GB") == (1, True) and batch("8") == (4, True) and batch("24 GB") == (4, False)


def test_a_family_without_recipes_is_told(tmp_path, capsys):
    base = Path(shutil.copytree(TINY, tmp_path / "upscaler"))
    index = json.loads((base / "model_index.json").read_text())
    scheduler = {"_class_name": "StableDiffusionUpscalePipeline", "low_res_scheduler": ["diffusers", "DDPMScheduler"]}
    (base / "model_index.json").write_text(json.dumps(index | scheduler))
    shutil.copytree(base / "scheduler", base / "low_res_scheduler")
    assert main(["new", str(ROOT / "datasets" / "style"), "--base", str(base), "--out", str(tmp_path / "x.yaml")]) == 2
    assert "is of the family upscaler; `new` writes recipes for sd1, sd2, sd3, sdxl" in capsys.readouterr().err


def test_mistakes(tmp_path, capsys):
    for arguments, words in ((["datasets", "--base", "sd16"], "sd15"), ([str(tmp_path)], "no picture"),
                             ([str(tmp_path / "none")], "none")):
        assert main(["new", *arguments, "--out", str(tmp_path / "x.yaml")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()
