"""`finetune sample` and `finetune merge` on the tiny base."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from finetune import registry
from finetune.artifact import Artifact, write_safetensors
from finetune.cli import main
from finetune.families._source import TINY
from finetune.formats import base as formats

PATH = "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    tensors = {f"{PATH}.lora_A": torch.randn(2, 128, generator=g), f"{PATH}.lora_B": torch.randn(64, 2, generator=g),
               f"{PATH}.alpha": torch.tensor(1.0)}
    path = tmp_path_factory.mktemp("adapter") / "strong.safetensors"
    formats.save(Artifact("lora", "sd1", tensors, {"ss_output_name": "strong"}), path, "kohya",
                 registry.find("families", "sd1").SPEC)
    return path


def sample(out, *arguments) -> int:
    return main(["sample", "--base", "tiny", "--steps", "2", "--out", str(out), *map(str, arguments)])


def test_a_picture_depends_on_its_seed_only(tmp_path):
    assert sample(tmp_path / "many", "--prompt", "a red circle", "--prompt", "a blue star", "--count", 3, "--seed", 4) == 0
    assert sample(tmp_path / "one", "--prompt", "a blue star", "--seed", 6) == 0
    names = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert names == ["0000-seed4.png", "0001-seed5.png", "0002-seed6.png", "0003-seed4.png", "0004-seed5.png",
                     "0005-seed6.png"]
    one, many = (Image.open(tmp_path / p).convert("RGB").tobytes() for p in ("one/0000-seed6.png", "many/0005-seed6.png"))
    assert max(abs(a - b) for a, b in zip(one, many)) <= 1
    facts = json.loads(Image.open(tmp_path / "many/0005-seed6.png").text["finetune"])
    assert facts["prompt"] == "a blue star" and facts["seed"] == 6 and facts["base"] == "tiny"


def test_tiles_show_the_same_in_parts(tmp_path, monkeypatch):
    from diffusers.models.autoencoders.vae import Decoder

    sizes, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, z, *rest: sizes.append(z.shape[-1]) or forward(self, z, *rest))
    for name, words in (("whole", []), ("tiles", ["--tiles"])):
        assert sample(tmp_path / name, "--prompt", "a red circle", "--size", "128x128", *words) == 0
    whole, tiles = (Image.open(tmp_path / name / "0000-seed0.png").convert("RGB").tobytes() for name in ("whole", "tiles"))
    assert sizes[0] == 32 and max(sizes[1:]) == 16 and 0 < sum(abs(a - b) for a, b in zip(whole, tiles)) / len(whole) < 20


def test_strengths_and_grid(tmp_path, adapter):
    assert sample(tmp_path / "out", "--prompt", "a red circle", "--adapter", adapter, "--strengths", "0,0.5,1",
                  "--grid", tmp_path / "sheets" / "grid.png") == 0
    assert sample(tmp_path / "base", "--prompt", "a red circle") == 0
    pictures = {s: (tmp_path / "out" / f"0000-seed0-strength{s}.png") for s in ("0", "0.5", "1")}
    pixels = {s: Image.open(p).tobytes() for s, p in pictures.items()}
    assert pixels["0"] == Image.open(tmp_path / "base" / "0000-seed0.png").tobytes()
    assert len(set(pixels.values())) == 3
    assert Image.open(tmp_path / "sheets" / "grid.png").width > 3 * 128


def test_merged_is_what_diffusers_loads_and_what_sample_shows(tmp_path, adapter):
    assert main(["merge", "--base", "tiny", "--adapter", f"{adapter}:0.5", "--dtype", "float32",
                 "--out", str(tmp_path / "m")]) == 0
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "m", dtype=torch.float32)
    loaded = StableDiffusionPipeline.from_pretrained(TINY, dtype=torch.float32)
    loaded.load_lora_weights(str(adapter))
    loaded.fuse_lora(lora_scale=0.5)
    x, t, e = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 128)
    with torch.no_grad():
        mine, theirs = (p.unet(x, t, encoder_hidden_states=e).sample for p in (merged, loaded))
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    ids = merged.tokenizer("a red circle", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(merged.text_encoder(ids)[0], loaded.text_encoder(ids)[0])
    assert (tmp_path / "m" / "tokenizer" / "vocab.json").is_file()
    assert main(["merge", "--base", "tiny", "--adapter", str(adapter),
                 "--out", str(tmp_path / "m")]) == 2   # never overwritten


@pytest.mark.parametrize("arguments, said", [
    (["--prompt", "x", "--adapter", "nowhere.safetensors"], "no file nowhere"),
    (["--prompt", "x", "--scheduler", "DDIMSheduler"], "did you mean 'DDIMScheduler'"),
    (["--prompt", "x", "--dtype", "float31"], "did you mean 'float32'"),
    (["--prompt", "x", "--size", "65x64"], "multiples of 8"),
    (["--prompt", "x", "--strengths", "a"], "numbers with commas"),
    (["--prompt", "x", "--count", "0"], "at least 1"),
    (["--prompts", "nowhere.txt"], "cannot be read"),
    (["--prompt", "x", "--scheduler", "RePaintScheduler"], "is not for bases like this"),
    (["--prompt", "x", "--strengths", "0.5"], "of an --image it is --strength"),
    (["--prompt", "x", "--strength", "0.5"], "strength is about an image, and there is none"),
    (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png: cannot be read"),
    (["--prompt", "x", "--image", "nowhere.png", "--strength", "0.4"], "less than one step"),
    (["--prompt", "x", "--guidance", "nan"], "--guidance: wants a finite number"),
    (["--prompt", "x", "--steps", "2000"], "more than the 1000"),
    (["--prompt", "\udcff"], "--prompt: '\\udcff' is not text in UTF-8"),
])
def test_mistakes_are_said(tmp_path, capsys, arguments, said):
    assert sample(tmp_path / "out", *arguments) == 2
    assert said in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(tmp_path, capsys):
    tensors = {f"{PATH}.lora_A": torch.ones(2, 768), f"{PATH}.lora_B": torch.ones(320, 2), f"{PATH}.alpha": torch.tensor(1.0)}
    path = tmp_path / "sd15.safetensors"
    formats.save(Artifact("lora", "sd1", tensors, {}), path, "kohya", registry.find("families", "sd1").SPEC)
    assert sample(tmp_path / "out", "--prompt", "x", "--adapter", path) == 2
    assert "does not fit this base" in capsys.readouterr().err


def test_verify_and_convert(tmp_path, adapter, capsys):
    assert main(["convert", str(adapter), "--to", "diffusers", "--out", str(tmp_path / "d.safetensors")]) == 0
    for file in (adapter, tmp_path / "d.safetensors"):
        assert main(["verify", str(file), "--base", "tiny"]) == 0
        said = capsys.readouterr().out
        assert "FAIL" not in said and "diffusers at strength 0.5" in said
    assert main(["convert", str(tmp_path / "d.safetensors"), "--to", "kohya", "--out", str(tmp_path / "k.safetensors")]) == 0
    one, other = (formats.load(p, registry.find("families", "sd1").SPEC).tensors
                  for p in (adapter, tmp_path / "k.safetensors"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert main(["convert", str(adapter), "--to", "kohia", "--out", str(tmp_path / "x.safetensors")]) == 2
    assert main(["convert", str(adapter), "--to", "kohya", "--out", str(adapter)]) == 2


def test_verify_fails_a_file_that_does_nothing(tmp_path, capsys):
    tensors = {f"{PATH}.lora_A": torch.ones(2, 128), f"{PATH}.lora_B": torch.zeros(64, 2), f"{PATH}.alpha": torch.tensor(1.0)}
    path = tmp_path / "nothing.safetensors"
    formats.save(Artifact("lora", "sd1", tensors, {}), path, "kohya", registry.find("families", "sd1").SPEC)
    assert main(["verify", str(path)]) == 2
    assert "FAIL  not zero" in capsys.readouterr().out


def test_a_prompt_that_would_be_cut_is_refused(tmp_path, capsys):
    assert sample(tmp_path / "out", "--prompt", "red " * 80) == 2
    assert "would lose" in capsys.readouterr().err


def test_verify_fails_a_file_that_diffusers_reads_otherwise(tmp_path, capsys):
    """diffusers gives every module of a kohya file the most frequent alpha: mixed alphas load wrong there, and it is said."""
    other = PATH.replace("attn2.to_v", "attn1.to_v")
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for path, width, alpha in ((PATH, 128, 1.0), (other, 64, 4.0)):
        flat = "lora_unet_" + path.removeprefix("denoiser.").replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": torch.randn(2, width, generator=g),
                    f"{flat}.lora_up.weight": torch.randn(64, 2, generator=g), f"{flat}.alpha": torch.tensor(alpha)}
    write_safetensors(tmp_path / "mixed.safetensors", tensors, {})
    assert main(["verify", str(tmp_path / "mixed.safetensors"), "--base", "tiny"]) == 2
    assert "FAIL  diffusers at strength 1" in capsys.readouterr().out
