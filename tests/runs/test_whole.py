"""Whole runs of what trains the base's own weights: a full fine-tune, and the decoder of the VAE."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.recipe import load
from finetune.train import loop

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "finetune" / "assets" / "tiny"
CUT = ["--set", "train.max_steps=4", "--set", "train.gradient_accumulation=1", "--set", "train.learning_rate=1e-4"]
FULL = ["--set", "method={kind: full, targets: [cross_attention], extract_rank: 4, text: {}}", *CUT]
COARSE = ["--set", "base.dtype=bfloat16", "--set", "train.clip_norm=null"]
VAE = ["--set", "method={kind: vae_decoder}", "--set", "objective={ssim: 0.5, gradient: 1.0}",
       "--set", "export=[kohya, diffusers]", *CUT]
JUDGED = [*VAE, "--set", "objective={gradient: 1.0, adversarial: {start: 1}}"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Crash(BaseException):
    pass


RUNS = {
    "full": FULL,
    "full in bfloat16, gradients released": [*FULL, *COARSE, "--set", "train.gradient_release=true"],
    "full with ema": [*FULL, "--set", "train.ema={decay: 0.5}"],
    "vae_decoder": VAE,
    "vae_decoder with all": [*JUDGED, "--set", "train.ema={decay: 0.5}", "--set", "method.encoder=true"],
}


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_a_run_goes_on_bit_for_bit(recipe, train, tmp_path, monkeypatch, words):
    assert train(recipe, tmp_path / "whole", *words) == 0
    real = loop.one_step

    def one_step(run, step, batches):
        if step == 3:
            raise Crash
        return real(run, step, batches)

    monkeypatch.setattr(loop, "one_step", one_step)
    with pytest.raises(Crash):
        train(recipe, tmp_path / "cut", *words)
    monkeypatch.setattr(loop, "one_step", real)
    assert train(recipe, tmp_path / "cut", *words) == 0
    assert files(tmp_path / "cut" / "adapter") == files(tmp_path / "whole" / "adapter")


def test_released_gradients_train_the_same_and_are_never_two(recipe, train, tmp_path, monkeypatch):
    assert train(recipe, tmp_path / "held", *FULL, *COARSE) == 0
    real, at_once = loop.apply, set()

    def apply(run, norm):
        at_once.add(sum(p.grad is not None for p in run.parameters.values()))
        real(run, norm)

    monkeypatch.setattr(loop, "apply", apply)
    assert train(recipe, tmp_path / "released", *FULL, *COARSE, "--set", "train.gradient_release=true") == 0
    assert at_once == {1}
    held, released = (load_file(tmp_path / run / "checkpoints" / "step-00000004" / "parameters.safetensors")
                      for run in ("held", "released"))
    assert all(torch.equal(released[name], value) for name, value in held.items())


@pytest.mark.parametrize("words, found", [
    (FULL, "small/unet/diffusion_pytorch_model.safetensors"), (JUDGED, "small.safetensors")], ids=["full", "vae_decoder"])
def test_two_processes_train_the_same_as_one(recipe, train, train_by_two, tmp_path, words, found):
    words = [*words, "--set", "train.optimizer=sgd", "--set", "train.learning_rate=1e-2"]    # Adam enlarges rounding
    assert train(recipe, tmp_path / "one", *words, "--set", "train.batch_size=4") == 0
    train_by_two(recipe, tmp_path / "two", *words)
    one, two = (load_file(tmp_path / name / "adapter" / found) for name in ("one", "two"))
    assert sum((one[name] - two[name]).square().sum() for name in one) ** 0.5 <= 1e-5 * sum(
        one[name].square().sum() for name in one) ** 0.5


def test_a_full_fine_tune_is_a_model_that_plain_diffusers_loads(recipe, train, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    from finetune.families import sd1

    assert train(recipe, tmp_path / "run", *FULL, "--set", "export=[diffusers, single_file]") == 0
    out = tmp_path / "run" / "adapter"
    checks = json.loads((out / "verify.json").read_text())
    assert checks["small"] == checks["small.safetensors"] == [
        {"name": "loaded again as a base", "passed": True, "found": "relative difference 0.0e+00, at most 1e-05"}]
    assert "of the change is left out" in checks["small.lora.safetensors"][4]["found"]

    trained = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "parameters.safetensors")
    assert {name.split(".")[0] for name in trained} == {"denoiser", "text"}
    pipeline = DiffusionPipeline.from_pretrained(out / "small", safety_checker=None)
    parts = {"denoiser": pipeline.unet, "text": pipeline.text_encoder}
    for name, value in trained.items():
        part, path = name.split(".", 1)
        state = parts[part].state_dict()
        assert torch.equal(state.get(path, state.get(path.removeprefix("text_model."))), value)
    single = StableDiffusionPipeline.from_single_file(str(out / "small.safetensors"), config=str(TINY), local_files_only=True)
    assert all(torch.equal(t, pipeline.unet.state_dict()[name]) for name, t in single.unet.state_dict().items())
    base = sd1.load("tiny").parts["denoiser"].state_dict()
    assert sum(not torch.equal(value, base[name]) for name, value in pipeline.unet.state_dict().items()) == \
        sum(name.startswith("denoiser.") for name in trained)


def test_a_model_that_learned_a_token_too_is_saved_without_it(recipe, train, tmp_path):
    both = "method=[{kind: full, targets: [to_k]}, {kind: embedding, tokens: {zkw: {init: circle}}}]"
    words = ["--set", both, "--set", "data.caption.template='{text} zkw'", "--set", "export=[diffusers]", *CUT]
    assert train(recipe, tmp_path / "run", *words) == 0
    found = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert found == {"small", "zkw.safetensors", "verify.json"}
    tokenizer = json.loads((tmp_path / "run" / "adapter" / "small" / "tokenizer" / "vocab.json").read_text())
    assert "zkw" not in tokenizer


def test_a_tuned_vae_is_one_that_plain_diffusers_loads_and_every_command_uses(recipe, train, tmp_path, capsys):
    from diffusers import AutoencoderKL

    from finetune.cli import main
    from finetune.train import verify

    assert train(recipe, tmp_path / "run", *VAE) == 0
    out = tmp_path / "run" / "adapter"
    kohya, plain = out / "small.safetensors", out / "small.diffusers.safetensors"
    assert "psnr" in capsys.readouterr().err and {"psnr", "ssim"} == {*json.loads((out / "vae.json").read_text())["after"]}
    names = load_file(kohya)
    assert "decoder.up.2.block.0.conv1.weight" in names and "encoder.down.0.block.0.conv1.weight" in names

    base = AutoencoderKL.from_pretrained(TINY / "vae")
    ours = AutoencoderKL.from_config(base.config)
    ours.load_state_dict(load_file(plain))
    single = AutoencoderKL.from_single_file(str(kohya), config=str(TINY / "vae"))
    wanted = verify.drawn(ours.eval())
    assert torch.equal(verify.drawn(single.eval()), wanted) and not torch.equal(verify.drawn(base.eval()), wanted)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in base.state_dict().items()
               if not name.startswith(("decoder.", "post_quant_conv.")))

    merge = ["merge", "--base", "tiny", "--dtype", "float32", "--adapter"]
    assert main([*merge, str(kohya), "--out", str(tmp_path / "merged")]) == 0
    assert torch.equal(verify.drawn(AutoencoderKL.from_pretrained(tmp_path / "merged" / "vae").eval()), wanted)
    file = tmp_path / "merged.safetensors"
    assert main([*merge, str(kohya), "--out", str(file)]) == 0
    assert torch.equal(verify.drawn(AutoencoderKL.from_single_file(str(file), config=str(TINY / "vae")).eval()), wanted)
    assert main(["sample", "--base", str(file), "--prompt", "x",
                 "--out", str(tmp_path)]) == 2      # no published model is so thin
    assert main(["sample", "--base", "tiny", "--adapter", str(plain), "--prompt", "a red circle", "--steps", "1",
                 "--out", str(tmp_path / "pictures")]) == 0
    assert main(["verify", str(kohya), "--base", "tiny"]) == 0
    assert main(["inspect", str(kohya)]) == 0
    assert main(["convert", str(kohya), "--to", "diffusers", "--out", str(tmp_path / "again.safetensors")]) == 0
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], value) for name, value in load_file(plain).items())


def test_a_vae_of_another_shape_is_refused(tmp_path, capsys):
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from finetune.cli import main

    other = AutoencoderKL(block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2,
                          up_block_types=["UpDecoderBlock2D"] * 2)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    file = str(tmp_path / "other.safetensors")
    assert main(["merge", "--base", "tiny", "--adapter", file, "--out", str(tmp_path / "out")]) == 2
    assert "does not fit this base" in capsys.readouterr().err


def test_a_decoder_needs_no_captions_but_takes_masks_and_random_crops(recipe, train, tmp_path, pictures):
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        shutil.copy(path, folder)
    for path in folder.glob("*.png"):
        image = Image.open(path).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    words = [*VAE, "--set", f"data={{images: {folder}, resolution: 32, crop: random, mask: {{source: alpha}}}}"]
    assert train(recipe, tmp_path / "run", *words) == 0


@pytest.mark.parametrize("words, said", [
    ([*FULL, "--set", "export=[kohya]"], "export: kohya cannot hold adapters of the kind full"),
    ([*FULL, "--set", "objective={kind: decode}"], "objective.kind: full is trained by 'denoise'"),
    ([*VAE, "--set", "objective={kind: denoise}"], "objective.kind: vae_decoder is trained by 'decode'"),
    ([*VAE, "--set", "objective={timesteps: cosmap}"], "is of denoise, and the kind is decode"),
    ([*FULL, "--set", "method.targets=[to_kk]"], "matches no module of sd1.denoiser"),
    ([*FULL, "--set", "base.dtype=bfloat16", "--set", "train.schedule=constant", "--set",
      "train.optimizer=schedule_free_adamw"], "needs base.dtype: float32"),
])
def test_what_does_not_go_together_is_refused_before_the_first_step(recipe, train, tmp_path, capsys, words, said):
    assert train(recipe, tmp_path / "run", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_follows_from_the_method(tmp_path):
    def words(method: str, more: str = ""):
        (tmp_path / "r.yaml").write_text(f"base: {{path: tiny}}\ndata: {{images: x}}\nmethod: {{kind: {method}}}\n{more}")
        recipe = load(tmp_path / "r.yaml").recipe
        return recipe.train.optimizer, recipe.objective.kind, recipe.export

    assert words("full") == ("adamw8bit", "denoise", ("diffusers",))
    assert words("full", "train: {optimizer: sgd}") == ("sgd", "denoise", ("diffusers",))
    assert words("vae_decoder", "train: {max_steps: 1}") == ("adamw", "decode", ("kohya",))
    assert words("lora") == ("adamw", "denoise", ("kohya",))
