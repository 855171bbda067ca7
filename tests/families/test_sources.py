"""Bases that are not what they should be: each is told apart, and none is trained."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import FinetuneError
from finetune.families import base as families
from finetune.families import sd1
from finetune.families._source import TINY, check_family, locate
from finetune.families.base import Parts, fingerprint

WEIGHTS = {"unet": "unet/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors",
           "text_encoder": "text_encoder/model.safetensors"}


@pytest.fixture
def base(tmp_path) -> Path:
    """A copy of the tiny base; its weights are links."""
    def copy(source, target):
        os.symlink(source, target) if source.endswith(".safetensors") else shutil.copyfile(source, target)

    return Path(shutil.copytree(TINY, tmp_path / "base", copy_function=copy))


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def replace(file: Path, content: bytes) -> None:
    file.unlink()       # not through the link
    file.write_bytes(content)


def problem(path) -> str:
    with pytest.raises(FinetuneError) as error:
        sd1.load(str(path))
    assert str(error.value).startswith("base.")
    return str(error.value)


def test_a_copy_is_the_same_base_under_its_own_name(base):
    copy, tiny = sd1.load(str(base)), sd1.load("tiny")
    assert families.fingerprint(copy.parts) == families.fingerprint(tiny.parts)
    assert (copy.source.name, tiny.source.name) == ("base", "tiny")
    assert not any(p.requires_grad for part in copy.parts.values() for p in part.parameters())
    assert not any(part.training for part in copy.parts.values())


def test_a_changed_weight_is_another_base(base):
    before = families.fingerprint(sd1.load(str(base)).parts)
    weights = load_file(base / WEIGHTS["vae"])
    weights["quant_conv.bias"][0] += 0.5
    (base / WEIGHTS["vae"]).unlink()
    save_file(weights, base / WEIGHTS["vae"], {"format": "pt"})
    assert families.fingerprint(sd1.load(str(base)).parts) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_has_the_wanted_dtype(dtype):
    assert {p.dtype for part in sd1.load("tiny", dtype).parts.values() for p in part.parameters()} == {dtype}


@pytest.mark.parametrize("path", ["absent/folder/here", "./absent", "/absent", "~/absent"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(path):
    assert problem(path) == f"base.path: there is no folder {path}"


@pytest.mark.parametrize("path", ["someone/some-model", "tyny", "no good/name"])
def test_a_hub_model_that_cannot_be_reached_is_told(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = problem(path)
    assert f"{path} is neither `tiny`, nor a folder here" in said and "hub: " in said


def test_a_revision_or_a_variant_of_what_has_none_is_refused(base):
    for path, word in ((base, {"revision": "main"}), (base / WEIGHTS["unet"], {"revision": "main"}),
                       (base / WEIGHTS["unet"], {"variant": "fp16"})):
        with pytest.raises(FinetuneError, match=f"base.{next(iter(word))} .*has none to choose from"):
            sd1.outline(str(path), **word)


def test_a_file_and_a_folder_without_an_index_are_told(base):
    assert "it is the denoiser of a diffusers folder" in problem(base / WEIGHTS["unet"])
    assert "no diffusers folder" in problem(base / "unet")


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_an_index_that_is_no_json_is_told(base, file, content):
    replace(base / file, content)
    assert f"{file} is not JSON" in problem(base)


@pytest.mark.parametrize("name, family", [
    ("StableDiffusionXLPipeline", "sdxl"), ("StableDiffusionXLInpaintPipeline", "sdxl"),
    ("StableDiffusion3Pipeline", "sd3"), ("FluxPipeline", "flux"), ("KandinskyPipeline", "KandinskyPipeline"),
    ("", "no pipeline"), (3, "3"),
])
def test_another_familys_pipeline_is_named(base, name, family):
    edit(base / "model_index.json", _class_name=name)
    said = problem(base)
    advice = f"use family: {family}" if family in ("sdxl", "sd3") else "this version trains: sd1, sd2, sd3, sdxl"
    assert said.startswith("base.family: sd1, but") and f"is {family}: {advice}" in said


def test_a_family_that_is_known_is_recommended(base):
    edit(base / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(FinetuneError, match="use family: sdxl"):
        check_family(locate(str(base)), sd1.SPEC.name, ["sd1", "sdxl"])


@pytest.mark.parametrize("fields, what", [({"cross_attention_dim": 1024}, "use family: sd2"), ({"in_channels": 5}, "depth")])
def test_a_relative_in_the_same_pipeline_is_told_by_its_unet(base, fields, what):
    edit(base / "unet" / "config.json", **fields)
    assert what in problem(base)


@pytest.mark.parametrize("component, fields, what", [
    ("text_encoder", {"_attn_implementation": "someone/kernel"}, "'someone/kernel' is code from elsewhere"),
    ("text_encoder", {"text_config": {"attn_implementation": "flash_attention_2"}}, "is code from elsewhere"),
    ("unet", {"quantization_config": {"quant_method": "gguf"}}, "its quantization_config chooses whose code"),
    ("text_encoder", {"text_config": {"quantization_config": {}}}, "its quantization_config chooses whose code"),
    ("text_encoder", {"hidden_act": "x"}, "its text_encoder cannot be loaded"), ("text_encoder", {"pad_token_id": "x"}, "cannot be loaded"), ("vae", {"in_channels": None}, "its vae cannot"),
    ("unet", {"block_out_channels": -1}, "its unet cannot be loaded"), ("scheduler", {"prediction_type": {}}, "its scheduler predicts {}"),
    ("unet", {"cross_attention_dim": [64] * 3}, "its unet cannot"),
    ("text_encoder", {"hidden_size": "1"}, "its text_encoder cannot"),
    ("vae", {"latent_channels": "4"}, "its vae cannot"), ("scheduler", {"beta_start": "x"}, "its scheduler")])
def test_a_config_that_cannot_be_used_is_told(base, component, fields, what):
    edit(base / component / ("scheduler_config.json" if component == "scheduler" else "config.json"), **fields)
    assert what in problem(base)


@pytest.mark.parametrize("entry", [5, "x", {"a": 1}, [], [None, None]])
def test_an_index_whose_unet_is_none_is_told(base, entry):
    edit(base / "model_index.json", unet=entry)
    assert "it holds no unet: give a whole checkpoint" in problem(base)


@pytest.mark.parametrize("component", [*WEIGHTS, "tokenizer", "scheduler"])
def test_a_missing_component_is_named(base, component):
    shutil.rmtree(base / component)
    assert component in problem(base)


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("damage", ["gone", "half", "empty", "a tensor less", "only a pickle"])
def test_weights_that_are_not_whole_are_told(base, component, damage):
    file = base / WEIGHTS[component]
    whole = file.read_bytes()
    if damage == "a tensor less":       # the libraries would fill it with random numbers
        weights = load_file(file)
        lost = sorted(weights)[3]
        file.unlink()
        save_file({name: t for name, t in weights.items() if name != lost}, file, {"format": "pt"})
        assert lost.removeprefix("text_model.") in problem(base)
    elif damage == "only a pickle":
        file.unlink()
        torch.save({}, file.with_suffix(".bin"))
    else:
        replace(file, {"gone": b"", "half": whole[:len(whole) // 2], "empty": b""}[damage])
        if damage == "gone":
            file.unlink()
    assert f"its {component} " in problem(base)


def test_a_folder_with_nothing_but_a_variant_needs_no_word(base):
    for file in WEIGHTS.values():
        (base / file).rename((base / file).with_suffix(".fp16.safetensors"))
    assert families.fingerprint(sd1.load(str(base)).parts) == families.fingerprint(sd1.load("tiny").parts)
    assert sd1.load(str(base), variant="fp16")
    with pytest.raises(FinetuneError, match="its unet cannot be loaded|its text_encoder|its vae"):
        sd1.load(str(base), variant="bf16")


@pytest.mark.parametrize("entry", [None, [None, None], ["diffusers"], ["diffusers", "UNet2DConditionModel"],
                                   ["diffusers", "NoSuchScheduler"]])
def test_an_index_that_names_no_scheduler_is_told(base, entry):
    edit(base / "model_index.json", scheduler=entry)
    assert "scheduler" in problem(base)


@pytest.mark.parametrize("fields, what", [
    ({"prediction_type": "flow_prediction"}, "'flow_prediction'"),
    ({"beta_schedule": "sigmoid"}, "sigmoid is not implemented"),
    ({"trained_betas": [0.1, 0.2]}, "2 betas are not 1000"),
    ({"trained_betas": [0.1, 2.0], "num_train_timesteps": 2}, "at most 1"),
    ({"rescale_betas_zero_snr": True}, "zero signal"),
])
def test_a_noising_process_that_is_not_known_is_refused(base, fields, what):
    edit(base / "scheduler" / "scheduler_config.json", **fields)
    edit(base / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])       # PNDM has no zero SNR
    assert what in problem(base)


@pytest.mark.parametrize("fields", [
    {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {"beta_schedule": "squaredcos_cap_v2"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
])
def test_the_noising_process_is_read_from_the_scheduler(base, fields):
    edit(base / "scheduler" / "scheduler_config.json", **fields)
    edit(base / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    family = sd1.load(str(base))
    assert family.path.prediction == fields.get("prediction_type", "epsilon")
    assert family.path.steps == fields.get("num_train_timesteps", 1000)
    torch.testing.assert_close(family.path.alphas_cumprod.float(), family.scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_a_part_that_is_loaded_again_is_what_it_was():
    value = [1.0]
    parts = Parts(lambda name: torch.nn.PReLU(init=value[0]), ["text", "vae"])
    before = fingerprint({"vae": parts["vae"]})
    parts.let_go("vae", before)
    assert set(parts) == {"text"} and fingerprint({"vae": parts["vae"]}) == before
    parts.let_go("vae", before)
    value[0] = 2.0      # the file, changed during the run
    with pytest.raises(FinetuneError, match="the weights of its vae are others than at the start"):
        parts["vae"]
