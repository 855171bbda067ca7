"""A control branch from its recipe to pictures that follow: exact, as plain diffusers has it, and refused where it cannot be."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import load_file

from finetune import registry
from finetune.cli import main
from finetune.data.pixels import cut, plan_crop
from finetune.errors import FinetuneError
from finetune.recipe import load, schema
from finetune.train import loop
from finetune.train.plan import needs

PLAIN = ["--set", "method={kind: control}", "--set", "train.max_steps=3", "--set", "train.gradient_accumulation=1",
         "--set", "data.crop=random", "--set", "every.checkpoint=2"]


@pytest.fixture
def words(pictures):
    return [*PLAIN, "--set", f"data.condition={pictures}"]


def pixels(path):
    return torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8).int()


def test_it_is_resumed_proven_and_sampled_as_plain_diffusers_does(recipe, train, tmp_path, monkeypatch, words, pictures, capsys):
    class Crash(BaseException):
        pass

    def one_step(run, step, batches):
        if step == 2:
            raise Crash
        return real(run, step, batches)

    words = [*words, "--set", "train.ema={decay: 0.5}", "--set", "train.gradient_checkpointing=true", "--set",
             f"preview={{prompts: [a circle], conditions: [{pictures}/1.png, {pictures}/2.png], steps: 1}}"]
    assert train(recipe, tmp_path / "whole", *words, "--set", "every.preview=2") == 0
    real = loop.one_step
    monkeypatch.setattr(loop, "one_step", one_step)
    with pytest.raises(Crash):
        train(recipe, tmp_path / "cut", *words)
    monkeypatch.undo()
    assert train(recipe, tmp_path / "cut", *words) == 0
    assert main(["preview", str(tmp_path / "cut")]) == 0
    sheets = sorted((tmp_path / "whole" / "previews").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000000.png", "step-00000002.png"]
    assert all((tmp_path / "cut" / "previews" / sheet.name).read_bytes() == sheet.read_bytes() for sheet in sheets)
    assert Image.open(sheets[1]).width > 3 * 128        # the condition, the base and the branch
    folder = tmp_path / "whole" / "adapter" / "small"
    assert {p.name for p in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert all((tmp_path / "cut" / "adapter" / "small" / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())
    checks = json.loads((tmp_path / "whole" / "adapter" / "verify.json").read_text())["small"]
    assert {check["name"]: check["passed"] for check in checks}["diffusers at strength 0.5"]
    assert "ControlNet" in (tmp_path / "whole" / "report.html").read_text()

    condition = pictures / "3.png"
    sample = ["sample", "--base", "tiny", "--prompt", "a red circle on white", "--steps", "2", "--seed", "5", "--size", "64x48",
              "--guidance", "2"]
    follow = [*sample, "--adapter", str(folder), "--condition", str(condition)]
    assert main([*follow, "--strengths", "0,0.5,1", "--out", str(tmp_path / "out")]) == 0
    off, half, full = (tmp_path / "out" / f"0000-seed5-strength{s}.png" for s in ("0", "0.5", "1"))
    assert json.loads(Image.open(full).info["finetune"])["condition"] == "3.png"
    assert main([*sample, "--out", str(tmp_path / "base")]) == 0
    assert torch.equal(pixels(off), pixels(tmp_path / "base" / "0000-seed5.png"))
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        "finetune/assets/tiny", dtype=torch.float32, controlnet=ControlNetModel.from_pretrained(folder), safety_checker=None)
    shown = cut(Image.open(condition).convert("RGB"), plan_crop(*Image.open(condition).size, (48, 64)))
    for path, scale in ((half, 0.5), (full, 1.0)):
        theirs = pipe("a red circle on white", shown, 48, 64, 2, guidance_scale=2.0, controlnet_conditioning_scale=scale,
                      generator=torch.Generator().manual_seed(5)).images[0]
        theirs.save(tmp_path / "theirs.png")
        assert (pixels(path) - pixels(tmp_path / "theirs.png")).abs().max() <= 1

    capsys.readouterr()
    for command, told in (([*sample, "--adapter", str(folder), "--out", str(tmp_path / "x")], "give it --condition"),
                          ([*sample, "--condition", str(condition), "--out", str(tmp_path / "x")], "none of the adapters is a control"),
                          ([*follow, "--image", str(condition), "--out", str(tmp_path / "x")], "do not go together"),
                          ([*follow, "--adapter", str(folder), "--out", str(tmp_path / "x")], "one control branch"),
                          (["merge", "--base", "tiny", "--adapter", str(folder), "--out", str(tmp_path / "m")], "cannot be merged")):
        assert main(command) == 2 and told in capsys.readouterr().err
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["family"], facts["format"]) == ("control", "sd1", "diffusers")
    assert main(["verify", str(folder), "--base", "tiny"]) == 0 and "diffusers at strength 1" in capsys.readouterr().out
    given = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(given) | {"quantization_config": {"quant_method": "gguf"}}))
    assert main(["verify", str(folder), "--base", "tiny"]) == 2 and "quantization_config" in capsys.readouterr().out
    (folder / "config.json").write_text(given)
    assert main(["push", str(tmp_path / "whole"), "--to", "user/name", "--licence", "cc0-1.0", "--dry-run", str(tmp_path / "hub")]) == 0
    assert 'ControlNetModel.from_pretrained("user/name")' in (tmp_path / "hub" / "README.md").read_text()
    ControlNetModel.from_pretrained(tmp_path / "hub")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(tensors[f"{end}.weight"].any() for end in ("controlnet_mid_block", "controlnet_cond_embedding.conv_out"))


def test_two_processes_train_the_same_as_one(recipe, train, tmp_path, words):
    words = [*words, "--set", "train.optimizer=sgd"]       # Adam enlarges rounding
    assert train(recipe, tmp_path / "one", *words, "--set", "train.batch_size=4") == 0
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
               "--main_process_port", "29523", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "finetune", "train",
               str(recipe), "--run", str(tmp_path / "two"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "adapter" / "small" / "diffusion_pytorch_model.safetensors") for name in ("one", "two"))
    assert sum((one[name] - two[name]).square().sum() for name in one) ** 0.5 <= 1e-5 * sum(
        one[name].square().sum() for name in one) ** 0.5


@pytest.mark.parametrize("name, family", [("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl"), ("sd3-medium", "sd3")])
def test_every_unet_is_given_what_the_pipeline_gives_it(name, family, member):
    """With an effect at its end, a sampling run of the pipeline is one of our own calls."""
    base = registry.find("families", family).load(str(member(name)))
    method = registry.find("methods", "control").build(schema.Control(kind="control"), 0)
    if family == "sd3":
        with pytest.raises(FinetuneError, match="control is for sd1, sd2 and sdxl"):
            method.install(base)
        return
    method.install(base)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in method.parameters().values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    pipe = base.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    x, seen = torch.randn(1, 4, 8, 8, generator=g), torch.rand(1, 3, 64, 64, generator=g)
    theirs = pipe("a circle", image=seen, height=64, width=64, num_inference_steps=2, latents=x, guidance_scale=1.0,
                  output_type="latent").images
    pipe.scheduler.set_timesteps(2)
    geometry = torch.tensor([[64, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        told = replace(base.encode_text(["a circle"]), control=seen)
        for t in pipe.scheduler.timesteps:
            found = base.denoise(x, t.expand(1), told, geometry)
            x = pipe.scheduler.step(found, t, x).prev_sample
        assert (x - theirs).norm() <= 1e-5 * theirs.norm()
        with method.at(0):
            plain = base.denoise(x, t.expand(1), told, geometry)
        assert torch.equal(plain, base.denoise(x, t.expand(1), replace(told, control=None), geometry))


@pytest.mark.parametrize("change, told", [
    ("data.condition=null", "control wants data.condition"),
    ("method={kind: lora}", "data.condition is for the method control"),
    ("method=[{kind: control}, {kind: lora}]", "control is trained alone"),
    ("data.prior={prompt: a circle}", "control is trained alone"),
    ("base.quantize=int8", "control trains weights of the base, or a copy"),
    ("export=[kohya]", "kohya cannot hold adapters of the kind control"),
    ("data.caption.long=chunk", "and a control branch's, cannot leave out"),
    ("every.preview=1,preview.prompts=[x]", "has nothing to follow"),
    ("preview.conditions=[x.png]", "and go with prompts"),
    ("preview={prompts: [x], conditions: [x.png]}", "x.png: cannot be read: No such file")])
def test_what_cannot_be_is_refused(change, told, recipe, train, tmp_path, words, capsys):
    assert train(recipe, tmp_path / "run", *words, *(word for one in change.split(",p") for word in (
        "--set", one if one.startswith(change[:4]) else f"p{one}"))) == 2
    assert told in capsys.readouterr().err


def test_a_plan_counts_the_branch(recipe, words):
    found = needs(load(recipe, words[1::2]).recipe)
    assert found.trained == 2_626_928 and found.weights["control"] == found.gradients == 4 * found.trained
    assert found.phases["training"] > found.weights["denoiser"] + 2 * found.weights["control"] + found.state
