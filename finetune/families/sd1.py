"""Stable Diffusion 1.x: a UNet with text cross-attention, one CLIP, a 4-channel VAE (Rombach et al. 2022)."""

from functools import partial

from finetune.families import _unet, base

SPEC = base.FamilySpec(
    name="sd1",
    components={"denoiser": "unet", "text": "text_encoder", "vae": "vae"},
    kohya={"denoiser": "lora_unet", "text": "lora_te"},
    base_version="sd_v1",
    architecture="stable-diffusion-v1",
    targets=_unet.TARGETS,
)

outline = partial(_unet.outline, SPEC)
load = partial(base.load, outline)
