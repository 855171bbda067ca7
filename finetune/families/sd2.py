"""Stable Diffusion 2.x: SD 1.x with OpenCLIP-H, whose published config lacks the last layer, and heads of 64 numbers.

2.0 and 2.1 base predict noise at 512 pixels, 2.0 and 2.1 v at 768: the scheduler's config says which."""

from functools import partial

from finetune.families import _unet, base

SPEC = base.FamilySpec(
    name="sd2",
    components={"denoiser": "unet", "text": "text_encoder", "vae": "vae"},
    kohya={"denoiser": "lora_unet", "text": "lora_te"},
    base_version="sd_v2",
    architecture="stable-diffusion-v2",
    targets=_unet.TARGETS,
)

outline = partial(_unet.outline, SPEC)
load = partial(base.load, outline)
