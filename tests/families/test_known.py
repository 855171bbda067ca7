"""The known models at their real size, on the meta device, from the configs that are shipped."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from finetune import registry
from finetune.artifact import modules
from finetune.families import _original
from finetune.families.base import CLIP_TARGETS
from finetune.formats import _joint
from finetune.formats._identify import identify
from finetune.formats._dialects import dotted, from_ldm, to_sgm
from finetune.header import Header
from finetune.methods._targets import Part, resolve

CONFIGS = Path(registry.__file__).parent / "assets" / "configs"
SIZES = {"sd15": 859_520_964, "sd15-inpainting": 859_535_364, "sd21-base": 865_910_724, "sd21": 865_910_724, "sdxl": 2_567_463_684,
         "sd3-medium": 2_028_328_000, "sd35-medium": 2_243_171_520, "sd35-large": 8_056_627_520, "x4-upscaler": 473_398_020}
MODULES = {"sd15": [192, 72], "sd15-inpainting": [192, 72], "sd21-base": [192, 138], "sd21": [192, 138], "sdxl": [722, 72, 192],
           "sd3-medium": [285, 72, 192], "sd35-medium": [337, 72, 192], "sd35-large": [453, 72, 192], "x4-upscaler": [192, 138]}
FUSED = {"sd3-medium": 189, "sd35-medium": 215, "sd35-large": 301}      # q, k and v are one layer in SD 3's original names
FAMILIES = {"sd15": "sd1", "sd15-inpainting": "sd1", "sd21-base": "sd2", "sd21": "sd2", "sdxl": "sdxl", "x4-upscaler": "upscaler",
            "sd3-medium": "sd3", "sd35-medium": "sd3", "sd35-large": "sd3"}
CLASSES = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


@pytest.fixture(scope="module", params=SIZES)
def known(request):
    parts = json.loads((CONFIGS / f"{request.param}.json").read_text())
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(parts["unet"]) if "unet" in parts else \
            SD3Transformer2DModel.from_config(parts["transformer"])
        made = {"denoiser": denoiser, "vae": AutoencoderKL.from_config(parts["vae"])}
        for part, component in (("text", "text_encoder"), ("text_2", "text_encoder_2")):
            if component in parts:
                made[part] = CLASSES[parts[component]["architectures"][0]](CLIPTextConfig(**parts[component]))
        if "text_encoder_3" in parts:
            made["text_3"] = T5EncoderModel(T5Config(**parts["text_encoder_3"]))
    return request.param, made


def paths(made, part, spec, targets):
    groups = spec.targets if part == "denoiser" else CLIP_TARGETS
    return resolve(targets, Part(part, made[part], groups), "targets")


def test_sizes_and_lora_modules(known):
    name, made = known
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in made.items()}
    sd3 = "sd3" in name
    assert count["denoiser"] == SIZES[name]
    assert count["vae"] == (83_819_683 if sd3 else 55_325_927 if "upscaler" in name else 83_653_863)
    # That of SD 3's CLIP-L is projected, by an identity
    small = 123_650_304 if sd3 else 123_060_480
    assert count["text"] == (small if name[:3] in ("sd3",) or name[:4] in ("sd15", "sdxl") else 340_387_840)
    assert count.get("text_2", 694_659_840) == 694_659_840 and count.get("text_3", 4_762_310_656) == 4_762_310_656
    spec = registry.find("families", FAMILIES[name]).SPEC
    assert [len(paths(made, part, spec, ["all"])) for part in ("denoiser", *spec.encoders)] == MODULES[name]
    if not sd3:
        adapted = {f"lora_unet_{path.replace('.', '_')}.lora_down.weight":
                   ("F16", (4, *made["denoiser"].get_submodule(path).weight.shape[1:]))
                   for path in paths(made, "denoiser", spec, ["cross_attention"])}
        assert identify(Header(adapted, {}, {}))["family"] == spec.name


def test_every_layer_of_sd3_has_its_place_in_the_original(known):
    name, made = known
    if name not in FUSED:
        return
    lora = {"lora_A": torch.zeros(1, 1), "lora_B": torch.zeros(1, 1), "alpha": torch.tensor(1.0)}

    def fused(paths):
        return {path for _, path in modules(_joint.fused({f"denoiser.{path}.{role}": t for path in paths for role, t in lora.items()}))}

    ours = paths(made, "denoiser", registry.find("families", "sd3").SPEC, ["all"])
    weights = {row.theirs.removesuffix(".weight") for row in _original.rows("mmdit", made["denoiser"].state_dict())}
    assert len(fused(ours)) == FUSED[name] and fused(ours) <= weights
    everything = [path for path, m in made["denoiser"].named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(fused(everything)) > len(fused(ours))
    assert all(dotted(path.replace(".", "_")) == path for path in fused(everything) | {*everything})


def test_what_it_costs_to_show_a_hole(known):
    """The encoder, in every step, beside a forward pass of the network: in operations, for a picture of 512 pixels."""
    name, made = known
    if name != "sd15-inpainting":
        return
    with torch.device("meta"), torch.no_grad():
        with FlopCounterMode(display=False) as encoder:
            made["vae"].encode(torch.zeros(1, 3, 512, 512))
        with FlopCounterMode(display=False) as network:
            made["denoiser"](torch.zeros(1, 9, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
    assert [round(counted.get_total_flops() / 1e12, 1) for counted in (encoder, network)] == [1.1, 0.8]


def test_the_names_of_sgm_are_those_that_diffusers_reads(known):
    name, made = known
    if name != "sdxl":
        return
    ours = paths(made, "denoiser", registry.find("families", "sdxl").SPEC, ["all", "conv"])
    assert len(ours) == 722 + 66 and len({to_sgm(path) for path in ours}) == len(ours)
    for path in ours:
        assert from_ldm(to_sgm(path)) == path == from_ldm(path) and dotted(to_sgm(path).replace(".", "_")) == to_sgm(path)
    flat = {f"lora_unet_{to_sgm(path).replace('.', '_')}.{role}": torch.zeros(2, 2)
            for path in ours for role in ("lora_down.weight", "lora_up.weight")}
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(flat, made["denoiser"].config))
    found = {key.replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora").replace("_lora", ".lora").partition(".lora")[0]
             for key in theirs}
    assert found == {f"unet.{path}" for path in ours}
    assert to_sgm("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k") == "input_blocks.4.1.transformer_blocks.1.attn2.to_k"
