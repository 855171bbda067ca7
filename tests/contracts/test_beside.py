"""Networks that see more than noisy latents, from recipe to picture: a LoRA of an inpainting model, and one of an upscaler."""

import json

import pytest
from PIL import Image

from finetune import registry
from finetune.cli import main

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
    assert len(found) == 2 and all("diffusers at strength 0.5" in {check["name"] for check in checks} for checks in found.values())
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
    sample = ["sample", "--base", str(path), "--family", family, "--prompt", "a circle", "--steps", "1", "--out", str(tmp_path / "o")]
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
