"""What a file is by its keys and shapes, when it is no checkpoint in the original naming."""

import pytest

from finetune.errors import FinetuneError
from finetune.families._identify import identify
from finetune.header import Header


def header_of(**shapes) -> Header:
    return Header({name.replace("__", "."): ("F32", shape) for name, shape in shapes.items()}, {}, {})


UNET = "model__diffusion_model__"


@pytest.mark.parametrize("header, said", [
    (header_of(lora_unet_mid_block__lora_down__weight=(4, 8)), "an adapter .*--adapter"),
    (header_of(unet__mid_block__to_q__lora_A__weight=(4, 8)), "an adapter .*--adapter"),
    (header_of(emb_params=(2, 768)), "a learned token"),
    (header_of(control_model__input_blocks__0__0__weight=(8, 4, 3, 3)), "a ControlNet"),
    (header_of(down_blocks__0__resnets__0__conv1__weight=(8, 8, 3, 3)), "denoiser of a diffusers folder.*model_index.json"),
    (header_of(transformer_blocks__0__attn__to_q__weight=(8, 8)), "denoiser of a diffusers folder"),
    (header_of(conditioner__embedders__0__model__ln_final__weight=(8,)), "refiner"),
    (header_of(**{UNET + "double_blocks__0__img_attn__qkv__weight": (8, 8)}), "Flux"),
    (header_of(**{UNET + "label_emb__weight": (1000, 8), UNET + "input_blocks__0__0__weight": (8, 7, 3, 3)}), "upscaler"),
    (header_of(**{UNET + "input_blocks__0__0__weight": (8, 8, 3, 3)}), "variant of sd1 with 8 input channels"),
    (header_of(edm_mean=(4,), **{UNET + "input_blocks__0__0__weight": (8, 4, 3, 3)}), "EDM"),
    (header_of(text_encoders__t5xxl__transformer__scaled_fp8=(0,)), "quantized"),
    (header_of(model_ema__diffusion_modelout0bias=(1,), first_stage_model__decoder__up__0__block__0__conv1__weight=(1,)),
     "moving average alone"),
    (header_of(input_blocks__0__0__weight=(5,)), r"has the shape \(5,\), and no UNet begins so"),
    (header_of(some__weight=(1,)), "no part of a model in the original naming; its keys: 'some.weight'"),
])
def test_what_is_no_checkpoint_is_named(header, said):
    with pytest.raises(FinetuneError, match=said):
        identify(header)
