"""A base with parts from elsewhere, and without the last layers of its text encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import registry
from finetune.cli import main
from finetune.errors import FinetuneError
from finetune.families import base as families
from finetune.families import sd1, sd3, sdxl
from finetune.families._altered import altered
from finetune.families._identify import identify
from finetune.families._source import TINY, Changes, locate
from finetune.formats import single_file
from finetune.header import read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The tiny base with other weights of its VAE and its text encoder."""
    folder = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("bases") / "other"))
    for name, file in (("decoder.conv_out.bias", folder / "vae" / WEIGHTS),
                       ("text_model.final_layer_norm.bias", folder / "text_encoder" / "model.safetensors")):
        tensors = load_file(file)
        save_file(tensors | {name: tensors[name] + 0.25}, file, {"format": "pt"})
    return folder


def test_each_part_comes_from_a_folder_or_a_file_and_the_rest_stays(other):
    tiny, theirs = (sd1.load(str(path)) for path in (TINY, other))
    for paths in ({"vae": other}, {"vae": other / "vae", "text": other / "text_encoder"}, {"vae": other / "vae" / WEIGHTS},
                  {"text": other / "text_encoder" / "model.safetensors", "denoiser": other}):
        family = sd1.load("tiny", changes=Changes({part: str(path) for part, path in paths.items()}))
        for part in family.parts:
            wanted = theirs if part in paths else tiny
            assert families.fingerprint({part: family.parts[part]}) == families.fingerprint({part: wanted.parts[part]}), part
            assert families.settings(family.parts[part]) == families.settings(wanted.parts[part])
        assert family.source.name == "tiny" and len(family.source.notes) == len(paths)
        assert ("taken for one of this family" in str(family.source.notes)) == (paths.get("vae", other).is_file())


@pytest.mark.parametrize("part, file, fields, said", [
    ("vae", "vae/config.json", {"scaling_factor": 0.13025}, "base.vae: .*its scaling_factor is 0.13025, and the base's is 0.40487"),
    ("vae", "vae/config.json", {"block_out_channels": [16, 32, 32]}, "base.vae: .*its vae cannot be loaded"),
    ("denoiser", "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"},
     "base.denoiser: .*it predicts v_prediction, and the base epsilon: give it as base.path"),
])
def test_a_part_of_another_family_is_refused(other, tmp_path, part, file, fields, said):
    folder = Path(shutil.copytree(other, tmp_path / "wrong"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
    with pytest.raises(FinetuneError, match=said):
        sd1.load("tiny", changes=Changes({part: str(folder)}))


@pytest.mark.parametrize("changes, said", [
    (Changes({"text_2": "x"}), "base.text_2: sd1 has no such part; it has denoiser, text, vae"),
    (Changes({"vae": "nowhere"}), "base.vae: nowhere"),
    (Changes({"vae": str(TINY / "text_encoder" / "model.safetensors")}), "base.vae: .*it holds no vae, but text_encoder"),
    (Changes({"vae": str(TINY / "unet")}), "base.vae: .*scaling_factor is 0.18215"),
    (Changes({"text": "none"}), "base.text: sd1 cannot do without it; none is for text_3"),
    (Changes(clip_skip=4), "base.clip_skip: 4 leaves none of the 3 layers; at most 3"),
])
def test_what_cannot_be_is_told(changes, said):
    with pytest.raises(FinetuneError, match=said):
        sd1.load("tiny", changes=changes)


def test_a_t5_comes_from_elsewhere_with_its_vocabulary_or_is_left_out(member, tmp_path):
    with_t5, without = (str(member(name)) for name in ("sd35-medium", "sd3-medium"))
    long = ["red " * 100]
    whole, added, less = (sd3.load(path, changes=Changes({"text_3": t5} if t5 else {})) for path, t5 in (
        (with_t5, None), (without, with_t5), (with_t5, "none")))
    assert "text_3" not in less.parts and "75 tokens" in less.notes[-1] and "255 tokens" in added.notes[-1]
    states = [family.encode_text(long if family is not less else ["red"]).tokens[:, 77:] for family in (whole, added, less)]
    assert torch.equal(states[0], states[1]) and states[0].any() and not states[2].any()
    whole.parts.let_go("text_3", families.fingerprint({"text_3": whole.parts["text_3"]}))      # and loaded again for a text
    assert torch.equal(whole.encode_text(long).tokens[:, 77:], states[0])
    with pytest.raises(FinetuneError, match="would lose"):
        less.encode_text(long)

    shutil.copyfile(member("sd35-medium") / "text_encoder_3" / "model.safetensors", tmp_path / "t5.safetensors")
    for path in (tmp_path / "t5.safetensors", f"{with_t5}/text_encoder_3"):
        with pytest.raises(FinetuneError, match="base.text_3: .* has no tokenizer_3, and neither has the base: give"):
            sd3.load(without, changes=Changes({"text_3": str(path)}))
        same = sd3.load(with_t5, changes=Changes({"text_3": str(path)}))
        assert families.fingerprint({"": same.parts["text_3"]}) == families.fingerprint({"": whole.parts["text_3"]})


@pytest.mark.parametrize("part, file, fields, said", [
    ("text_3", "text_encoder_3/config.json", {"d_model": 64},
     "d_model of text_3 is 64, and the denoiser's joint_attention_dim 96"),
    ("text_2", "text_encoder_2/config.json", {"projection_dim": 32},
     "projection_dim of text . text_2 is 32 . 32, and the denoiser's pooled_projection_dim 96"),
    ("vae", "vae/config.json", {"latent_channels": 4}, "latent_channels of vae is 4, and the denoiser's out_channels 16"),
])
def test_a_part_of_another_width_is_told_before_a_weight_is_read(member, tmp_path, part, file, fields, said):
    """Here the base has no T5, so that none of its own tells the shapes."""
    own = member("sd35-medium")
    for path in (own / "model_index.json", *own.glob("tokenizer*/*"), *own.glob("*/*config.json")):
        (tmp_path / path.relative_to(own).parent).mkdir(exist_ok=True)
        shutil.copyfile(path, tmp_path / path.relative_to(own))
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | fields))
    for base, changes, word in ((member("sd3-medium"), {part: str(tmp_path)}, part), (tmp_path, {}, "path")):
        with pytest.raises(FinetuneError, match=f"base.{word}: {tmp_path}: {said}: they are of different models"):
            sd3.outline(str(base), changes=Changes(changes))


def test_what_a_base_predicts_can_be_said_and_goes_with_it(member, tmp_path):
    family = sd1.load("tiny", changes=Changes(prediction="v_prediction", zero_snr=True))
    families.write(family, tmp_path / "said", torch.float32)
    for each in (family, sd1.outline(str(tmp_path / "said"))):
        assert each.path.prediction == "v_prediction" and each.path.alphas_cumprod[-1] == 0
        assert each.scheduler.config.timestep_spacing == "trailing" and each.scheduler.config.rescale_betas_zero_snr
    sd2 = registry.find("families", "sd2").load(str(member("sd21")), changes=Changes(prediction="v_prediction", zero_snr=True))
    for each in (family, sd2):
        single_file.write(each, tmp_path / "said.safetensors", torch.float32, {})
        found = identify(read_header(tmp_path / "said.safetensors"))
        assert (found.family, found.prediction, found.zero_snr) == (each.spec.name, "v_prediction", True)
    clean = sd1.load("tiny", changes=Changes(prediction="sample"))
    with pytest.raises(FinetuneError, match="single_file: cannot say of a model that it predicts sample: write a diffusers"):
        single_file.write(clean, tmp_path / "no.safetensors", torch.float32, {})
    assert not (tmp_path / "no.safetensors").exists()
    with pytest.raises(FinetuneError, match="zero signal"):
        sd1.outline("tiny", changes=Changes(zero_snr=True))
    with pytest.raises(FinetuneError, match="base.prediction: a base on rectified flow"):
        sd3.outline(str(member("sd3-medium")), changes=Changes(prediction="epsilon"))


def test_two_encoders_are_never_skipped():
    with pytest.raises(FinetuneError, match="sdxl always takes its text encoders one layer before the last"):
        altered(locate("tiny"), sdxl.SPEC, Changes(clip_skip=2))


def test_a_clip_skip_is_that_of_web_uis():
    """AUTOMATIC1111, modules/sd_hijack_clip.py: hidden_states[-N], then the last norm. (The clip_skip of diffusers is one less,
    and does not run with transformers 5.6: it looks for `text_model`.)"""
    plain, skipped = sd1.load("tiny"), sd1.load("tiny", changes=Changes(clip_skip=2))
    captions = ["a red circle on white", ""]
    found = skipped.encode_text(captions).tokens
    ids = plain.tokenizers["text"](captions, padding="max_length", return_tensors="pt").input_ids
    encoder = plain.parts["text"]
    norm = next(m for name, m in encoder.named_modules() if name.endswith("final_layer_norm"))
    with torch.no_grad():
        wanted = norm(encoder(ids, output_hidden_states=True).hidden_states[-2])
    assert torch.equal(found, wanted) and not torch.equal(found, plain.encode_text(captions).tokens)
    same, _ = skipped.pipeline().encode_prompt(captions, torch.device("cpu"), 1, False)
    assert torch.equal(found, same) and skipped.text_settings() != plain.text_settings()
    assert families.fingerprint(skipped.parts) == families.fingerprint(plain.parts)


def test_a_run_on_an_altered_base_is_proven_goes_on_and_is_sampled_and_merged(recipe, train, tmp_path, other, capsys):
    vae = tmp_path / "secret" / "vae.safetensors"
    vae.parent.mkdir()
    shutil.copyfile(other / "vae" / WEIGHTS, vae)
    recipe.write_text(recipe.read_text().replace("path: tiny", f"path: tiny, vae: {vae}, clip_skip: 2")
                      .replace("dropout: 0.1}", "text: {targets: [all]}}").replace("max_steps: 6", "max_steps: 2"))
    assert train(recipe, tmp_path / "run") == 0
    assert "note: its vae is that of vae.safetensors; a file does not say" in capsys.readouterr().err
    file = tmp_path / "run" / "adapter" / "small.safetensors"
    checks = json.loads((tmp_path / "run" / "adapter" / "verify.json").read_text())["small.safetensors"]
    assert all(check["passed"] for check in checks) and {"diffusers at strength 1", "not zero"} <= {c["name"] for c in checks}
    header = read_header(file)
    assert {name.split("_layers_")[1][0] for name in header.tensors if "_layers_" in name} == {"0", "1"}
    said = json.loads(header.metadata["finetune.recipe"])["base"]
    assert (said["vae"], said["clip_skip"], header.metadata["ss_clip_skip"]) == ("vae.safetensors", 2, "2")
    assert header.metadata["ss_vae_name"] == "vae.safetensors" and "secret" not in str(header.metadata)

    moved = vae.rename(vae.with_name("moved.safetensors"))      # the same run: its content counts
    assert train(recipe, tmp_path / "run", "--set", f"base.vae={moved}") == 0
    for words in ("base.vae=null", "base.clip_skip=1"):
        assert train(recipe, tmp_path / "run", "--set", f"base.vae={moved}", "--set", words) == 2
        assert "base." in capsys.readouterr().err.split("cannot continue:")[1]

    base = ["--base", "tiny", "--vae", str(moved)]
    assert main(["verify", str(file), *base, "--clip-skip", "2"]) == 0
    assert main(["verify", str(file), "--vae", "x"]) == 2
    assert "--vae: is of a base, and there is none" in capsys.readouterr().err
    one = ["--adapter", str(file), "--prompt", "a red circle", "--steps", "1", "--size", "32x32"]
    for name, words in (("skipped", ["--clip-skip", "2"]), ("plain", [])):
        assert main(["sample", *base, *one, *words, "--out", str(tmp_path / name)]) == 0
    skipped, plain = (Image.open(tmp_path / name / "0000-seed0.png") for name in ("skipped", "plain"))
    assert skipped.tobytes() != plain.tobytes()
    assert "VAE: moved.safetensors, Clip skip: 2" in skipped.info["parameters"] and "skip" not in plain.info["parameters"]
    assert main(["merge", *base, "--adapter", str(file), "--dtype", "float32", "--out", str(tmp_path / "merged")]) == 0
    merged = sd1.load(str(tmp_path / "merged"))
    assert torch.equal(merged.parts["vae"].decoder.conv_out.bias, load_file(moved)["decoder.conv_out.bias"])
    assert any(".layers.2." in name for name, _ in merged.parts["text"].named_parameters())


def test_a_full_fine_tune_with_a_clip_skip_writes_whole_encoders(recipe, train, tmp_path):
    recipe.write_text(recipe.read_text().replace("path: tiny", "path: tiny, clip_skip: 2").replace("max_steps: 6", "max_steps: 1"))
    words = "method={kind: full, targets: [cross_attention], text: {}}"
    assert train(recipe, tmp_path / "run", "--set", words, "--set", "train.optimizer=adamw",
                 "--set", "train.warmup_steps=0", "--set", "export=[diffusers, single_file]") == 0
    checks = json.loads((tmp_path / "run" / "adapter" / "verify.json").read_text())
    assert len(checks) == 2 and all(check["passed"] for found in checks.values() for check in found)
    before, after = (load_file(path / "text_encoder" / "model.safetensors")
                     for path in (TINY, tmp_path / "run" / "adapter" / "small"))
    moved = {name for name in after if not torch.equal(after[name], before[name].float())}
    assert before.keys() == after.keys() and any(".layers.1." in name for name in moved)
    assert not any(".layers.2." in name for name in moved)
