"""Stable Diffusion ×4 upscaler: SD 2 in a space of latents that are 4 pixels wide, shown the small picture with some noise.

The UNet has 7 input channels, the last three the small picture's, and is told by a class how noisy that is."""

from functools import partial

from finetune.families import _unet, base

SPEC = base.FamilySpec(
    name="upscaler",
    components={"denoiser": "unet", "text": "text_encoder", "vae": "vae"},
    kohya={"denoiser": "lora_unet", "text": "lora_te"},
    base_version="sd_x4_upscaler",
    architecture="stable-diffusion-x4-upscaler",
    targets=_unet.TARGETS,
)

outline = partial(_unet.outline, SPEC)
load = partial(base.load, outline)
