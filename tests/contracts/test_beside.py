"""Networks that see more than noisy latents, from recipe to picture: a LoRA of an inpainting model, and one of an upscaler."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import registry
from finetune.cli import main
from finetune.families._source import TINY

MEMBERS = {"sd15-inpainting": ("sd1", "hole"), "x4-upscaler": ("upscaler", "small")}


@pytest.fixture(params=MEMBERS)
def base(request, member):
    return member(request.param), *MEMBERS[request.param]


@pytest.fixture
def recipe(tmp_path, pictures, base):
    path, family, shows = base
    file = tmp_path / "small.yaml"
    file.write_text(f"""
base: {{family: {family}, path: {path}}}
data: {{images: "{pictures}", resolution: 64, flip: true, caption: {{dropout: 0.2}}, mask: {{}}, validation: {{fraction: 0.3}},
       inpaint: {"{whole: 0.3}" if shows == "hole" else "null"}}}
method: {{kind: lora, rank: 2, targets: [all, conv], text: {{}}}}
train: {{max_steps: 2, batch_size: 2, learning_rate: 1e-2, threads: 1}}
every: {{log: 1, checkpoint: 1, validate: 1}}
export: [kohya, diffusers]
""")
    return file


def test_a_lora_is_trained_resumed_proven_and_sampled(recipe, train, tmp_path, base, pictures, capsys):
    path, family, shows = base
    run = tmp_path / "run"
    assert train(recipe, run) == 0
    losses = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "validation_loss" in line]
    found = json.loads((run / "adapter" / "verify.json").read_text())
    assert all(check["passed"] for checks in found.values() for check in checks)
    assert len(found) == 2 and all("diffusers at strength 0.5" in {check["name"] for check in checks}
                                   for checks in found.values())
    file = run / "adapter" / "small.safetensors"
    whole = file.read_bytes()
    (run / "adapter").rename(tmp_path / "whole")
    (run / "checkpoints" / "step-00000002").rename(tmp_path / "gone")
    assert train(recipe, run) == 0 and file.read_bytes() == whole
    again = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "validation_loss" in line]
    assert [line["validation_loss"] for line in again] == [line["validation_loss"] for line in losses]

    Image.new("L", Image.open(pictures / "3.png").size, 255).save(tmp_path / "mask.png")
    order = ["--mask", str(tmp_path / "mask.png"), "--size", "64x64"] if shows == "hole" else ["--upscale"]
    assert main(["inspect", str(file), "--json"]) == 0 and json.loads(capsys.readouterr().out)["family"] == family
    sample = ["sample", "--base", str(path), "--family", family, "--prompt", "a circle", "--steps", "1",
              "--out", str(tmp_path / "o")]
    assert main([*sample, "--adapter", str(file), "--image", str(pictures / "3.png"), *order]) == 0
    made = Image.open(next((tmp_path / "o").glob("*.png")))
    assert made.size == ((64, 64) if shows == "hole" else (4 * 48, 4 * 36))       # of 49 × 36
    assert json.loads(made.info["finetune"])["size"] == f"{made.width}x{made.height}"
    words = ["merge", "--base", str(path), "--family", family, "--adapter", str(file), "--out", str(tmp_path / "merged")]
    assert main(words) == 0 and registry.find("families", family).outline(str(tmp_path / "merged")).shows == shows
    capsys.readouterr()
    assert main([*sample, "--overwrite"]) == 2
    assert f"give it --image and --{'mask' if shows == 'hole' else 'upscale'}" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    ("every.preview=1,preview.prompts=[x]", "every.preview: this base paints nothing from a prompt alone"),
    ("data.prior={prompt: a circle}", "data.prior: this base makes no pictures from a prompt alone"),
    ("data.caption.long=chunk", "data.caption.long: an upscaler's layers"),
    ("method={kind: full},export=[single_file]", "single_file: cannot hold a model of upscaler")])
def test_what_such_a_base_cannot_is_refused(words, told, recipe, train, tmp_path, base, capsys):
    if "upscaler" in told and base[2] == "hole":
        return
    arguments = [part for word in words.split(",") for part in ("--set", word)]
    assert train(recipe, tmp_path / "run", *arguments) == 2
    assert told in capsys.readouterr().err


def test_other_bases_do_not_upscale(pictures, tmp_path, capsys):
    sample = ["sample", "--base", "tiny", "--prompt", "x", "--steps", "1", "--out", str(tmp_path / "o"), "--upscale"]
    assert main([*sample, "--image", str(pictures / "3.png")]) == 2
    assert "this base cannot --upscale" in capsys.readouterr().err
    for more, told in (([], "upscale is about an image"),
                       (["--image", str(pictures / "3.png"), "--strength", "1.0"], "strength does not go with upscale")):
        assert main([*sample, *more]) == 2 and told in capsys.readouterr().err


def widened(shows: str, folder: Path) -> Path:
    """The tiny base with as many more input channels, of zeros, as what it is then shown has; it was never shown anything."""
    wide = Path(shutil.copytree(TINY, folder / shows))
    file, more = wide / "unet" / "diffusion_pytorch_model.safetensors", {"hole": 5, "small": 3}[shows]
    weights, config = load_file(file), {"in_channels": 4 + more}
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, first.new_zeros(first.shape[0], more, *first.shape[2:])], 1)
    if shows == "small":
        weights["class_embedding.weight"], config["num_class_embeds"] = first.new_zeros(1000, 256), 1000
        shutil.copytree(wide / "scheduler", wide / "low_res_scheduler")
        index = json.loads((wide / "model_index.json").read_text())
        (wide / "model_index.json").write_text(json.dumps(index | {
            "_class_name": "StableDiffusionUpscalePipeline", "low_res_scheduler": index["scheduler"]}))
    save_file(weights, file, {"format": "pt"})
    path = wide / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return wide


@pytest.mark.slow
def test_a_lora_learns_from_what_it_is_shown(train, tmp_path):
    """Beside the tiny base itself under the same settings: nothing tells of random squares but that they are shown."""
    draw = np.random.default_rng(0)
    for role, count in (("learn", 200), ("held", 16)):
        (tmp_path / role).mkdir()
        for i in range(count):
            squares = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            squares.resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / role / f"{i}.png")
    loss = {}
    for shows, base, family in (("nothing", "tiny", "sd1"), ("hole", widened("hole", tmp_path), "sd1"),
                                ("small", widened("small", tmp_path), "upscaler")):
        recipe = tmp_path / f"{shows}.yaml"
        recipe.write_text(f"""
base: {{family: {family}, path: {base}}}
data: {{images: "{tmp_path}/learn", resolution: 32, caption: {{template: coloured squares, dropout: 0.1}},
       inpaint: {"{whole: 0.1}" if shows == "hole" else "null"}, validation: {{images: "{tmp_path}/held"}}}}
method: {{kind: lora, rank: 16, alpha: 16, targets: [all, conv, conv_in]}}
objective: {{weighting: {{kind: min_snr, gamma: 5}}}}
train: {{max_steps: 150, batch_size: 8, learning_rate: 2e-3, schedule: cosine, warmup_steps: 10, threads: 1}}
every: {{validate: 150, checkpoint: 0}}
export: [diffusers]
""")
        assert train(recipe, tmp_path / f"run-{shows}") == 0
        rows = map(json.loads, (tmp_path / f"run-{shows}" / "metrics.jsonl").read_text().splitlines())
        loss[shows] = [row["validation_loss"] for row in rows if "validation_loss" in row]
    print(loss)
    assert loss["nothing"][-1] < 0.5 * loss["nothing"][0] and abs(loss["hole"][0] / loss["nothing"][0] - 1) < 1e-4
    assert loss["hole"][-1] < 0.9 * loss["nothing"][-1] and loss["small"][-1] < 0.9 * loss["nothing"][-1]
