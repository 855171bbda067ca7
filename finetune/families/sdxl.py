"""Stable Diffusion XL: CLIP-L beside OpenCLIP-G, both without their last layer, and the picture's size (Podell et al. 2024).

The UNet is told six numbers of each picture: its original height and width, where it was cropped, the size of the crop."""

from functools import partial

from finetune.families import _unet, base
from finetune.families._clip import Clip

SPEC = base.FamilySpec(
    name="sdxl",
    components={"denoiser": "unet", "text": "text_encoder", "text_2": "text_encoder_2", "vae": "vae"},
    kohya={"denoiser": "lora_unet", "text": "lora_te1", "text_2": "lora_te2"},
    base_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base",
    targets=_unet.TARGETS,
    sgm=True,
)
TEXT = {"text": Clip(hidden=-2), "text_2": Clip(hidden=-2, pooled=True)}

outline = partial(_unet.outline, SPEC, text=TEXT)
load = partial(base.load, outline)
