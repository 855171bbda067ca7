"""What a single file is, from its keys and shapes: the family, the parts it holds, and what else it says.

Nothing here needs torch; names of files are not looked at.
"""

import re
from dataclasses import dataclass

from finetune.errors import FinetuneError
from finetune.header import Header

Place = tuple[str, str]         # a kind of `_original.KINDS`, and what stands before its names

# family -> component of the diffusers pipeline -> where a published file has it
_LDM = {"unet": ("unet", "model.diffusion_model."), "vae": ("vae", "first_stage_model.")}
LAYOUTS: dict[str, dict[str, Place]] = {
    "sd1": _LDM | {"text_encoder": ("clip", "cond_stage_model.transformer.")},
    "sd2": _LDM | {"text_encoder": ("open_clip", "cond_stage_model.model.")},
    "sdxl": _LDM | {"text_encoder": ("clip", "conditioner.embedders.0.transformer."),
                    "text_encoder_2": ("open_clip", "conditioner.embedders.1.model.")},
    "sd3": {"transformer": ("mmdit", "model.diffusion_model."), "vae": ("vae", "first_stage_model."),
            "text_encoder": ("unprojected_clip", "text_encoders.clip_l.transformer."),
            "text_encoder_2": ("clip", "text_encoders.clip_g.transformer."),
            "text_encoder_3": ("t5", "text_encoders.t5xxl.transformer.")},
}
# A tensor that every part of this kind has.
SIGNS = {
    "unet": "input_blocks.0.0.weight", "mmdit": "joint_blocks.0.x_block.attn.qkv.weight",
    "vae": "decoder.up.0.block.0.conv1.weight",
    "clip": "text_model.embeddings.token_embedding.weight", "unprojected_clip": "text_model.embeddings.token_embedding.weight",
    "flat_clip": "embeddings.token_embedding.weight", "open_clip": "token_embedding.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight", "diffusers_vae": "decoder.up_blocks.0.resnets.0.conv1.weight",
}
# The parts that come alone.
_ALONE = (("vae", "vae", "first_stage_model."), ("vae", "vae", ""), ("vae", "diffusers_vae", ""), ("text_encoder", "clip", ""),
          ("text_encoder_3", "t5", ""))

_BASE = "; it is no base by itself"
# What a file is if one of its names matches, and what to do with it.
_OTHERS = (
    (r"\.(lora_(down|up|A|B)|hada_w1_|lokr_w|oft_blocks|diff)\b|\.lora\.(down|up)\.", "an adapter (a LoRA or a relative)",
     "give it with --adapter, or as method.start_from"),
    (r"^(emb_params|clip_l|clip_g|string_to_param)$", "a learned token (textual inversion)", "give it with --adapter"),
    (r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|comfy_quant)$", "quantized: its weights need scales beside them",
     "get the float16 or bfloat16 version"),
    (r"^control_model\.|^input_hint_block\.|\.input_hint_block\.", "a ControlNet", "give the checkpoint that it was made for"),
    (r"(^|\.)double_blocks\.0\.", "of the Flux family, which is not trained here", "give a model of Stable Diffusion"),
    (r"^conditioner\.embedders\.0\.model\.", "the refiner of SDXL, which is not trained here", "give the base model of SDXL"),
    (r"^edm_(mean|std)$|^edm_vpred\.", "an SDXL with the noising of EDM (Playground 2.5, CosXL), which is not trained here",
     "give another model of SDXL"),
    (r"^embedder\.model\.visual\.", "an unCLIP, which is not trained here", "give Stable Diffusion 2.1 itself"),
    (r"(^|\.)label_emb\.weight$", "the ×4 upscaler or a relative", "give its diffusers folder with family: upscaler"),
    (r"^(unet\.|transformer\.)?(down_blocks\.0\.(attentions|resnets)|transformer_blocks\.0\.)",
     "the denoiser of a diffusers folder" + _BASE, "give the whole folder, the one with model_index.json"),
)


@dataclass(frozen=True)
class Known:
    """What a single file was recognised as."""

    family: str | None              # None for a VAE without a model around it
    name: str | None                # of the config in assets/configs
    places: dict[str, Place]        # the components it holds, and where
    prediction: str | None = None   # where the file says it, as diffusers does: epsilon or v_prediction
    zero_snr: bool = False          # zero terminal SNR, likewise
    notes: tuple[str, ...] = ()     # what else is in it


def identify(header: Header) -> Known:
    """Raises FinetuneError for what is no checkpoint in the original naming: what it is, and what to do."""
    names = header.tensors
    for pattern, what, advice in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            raise FinetuneError(f"it is {what}: {advice}")
    denoiser = next(((kind, prefix) for prefix in ("model.diffusion_model.", "") for kind in ("unet", "mmdit")
                     if prefix + SIGNS[kind] in names), None)
    if not denoiser:
        return _without_denoiser(header)
    shapes = {name.removeprefix(denoiser[1]): shape for name, (_, shape) in names.items() if name.startswith(denoiser[1])}
    family, name = _mmdit(shapes) if denoiser[0] == "mmdit" else _unet(shapes)
    places = {}
    for component, (kind, prefix) in LAYOUTS[family].items():
        if component in ("unet", "transformer"):
            places[component] = denoiser
        elif prefix + SIGNS[kind] in names:
            linear = kind == "open_clip" and f"{prefix}text_projection.weight" in names
            places[component] = "linear_open_clip" if linear else kind, prefix
        elif kind == "clip" and prefix + SIGNS["flat_clip"] in names:
            places[component] = "flat_clip", prefix
    said = header.metadata.get("modelspec.prediction_type", "")
    prediction = "v_prediction" if "v_pred" in names or said.startswith("v") else "epsilon" if said.startswith("eps") else None
    if name == "sd21-base" and prediction == "v_prediction":
        name = "sd21"
    return Known(family, name, places, None if family == "sd3" else prediction, "ztsnr" in names, _notes(header, places))


def _without_denoiser(header: Header) -> Known:
    names = header.tensors
    if any(name.startswith("model_ema.diffusion_model") for name in names):
        raise FinetuneError("its denoiser is there as a moving average alone (model_ema.), which is not read: get the version "
                            "with model.diffusion_model.")
    places = {component: (kind, prefix) for component, kind, prefix in _ALONE if prefix + SIGNS[kind] in names}
    if places:
        return Known(None, None, places, notes=_notes(header, places))
    some = ", ".join(map(repr, sorted(names)[:3]))
    raise FinetuneError(f"it holds no part of a model in the original naming; its keys: {some or 'none'}: "
                        "give a checkpoint of Stable Diffusion")


def _unet(shapes: dict[str, tuple[int, ...]]) -> tuple[str, str]:
    """(family, config). SD 1 enters its transformers by convolutions, SD 2 by linear layers; SDXL is told the size."""
    if len(first := shapes[SIGNS["unet"]]) != 4:
        raise FinetuneError(f"its {SIGNS['unet']} has the shape {first}, and no UNet begins so: it is damaged")
    channels = first[1]
    if "label_emb.0.0.weight" in shapes:
        family = "sdxl"
        if "input_blocks.9.0.op.weight" in shapes or "input_blocks.9.0.in_layers.0.weight" in shapes:
            raise FinetuneError("it is the refiner of SDXL or an unCLIP, which are not trained here: give the base model")
    else:
        family = "sd2" if len(shapes.get("input_blocks.1.1.proj_in.weight", ())) == 2 else "sd1"
    known = {"sd1": {4: "sd15", 9: "sd15-inpainting"}, "sd2": {4: "sd21-base", 9: "sd2-inpainting"},
             "sdxl": {4: "sdxl", 9: "sdxl-inpainting"}}[family]
    if channels not in known:
        raise FinetuneError(f"it is a variant of {family} with {channels} input channels (depth, pix2pix, …), and "
                            f"those with {' or '.join(map(str, known))} are trained here")
    return family, known[channels]


def _mmdit(shapes: dict[str, tuple[int, ...]]) -> tuple[str, str]:
    blocks = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"joint_blocks\.(\d+)\.", name)))
    if any(".x_block.attn2." in name for name in shapes):
        return "sd3", "sd35-medium"
    return "sd3", "sd35-large" if blocks == 38 else "sd3-medium"


_BESIDE = re.compile(r"(sqrt_|log_one_minus_)?(one_minus_)?(recip_|recipm1_)?(alphas|betas)|posterior_|logvar$|lvlb_weights$|"
                     r"scale_factor$|denoiser\.|v_pred$|ztsnr$|cond_stage_model\.logit_scale$|text_encoders\.\w+\.logit_scale$")


def _notes(header: Header, places: dict[str, Place]) -> tuple[str, ...]:
    """What is in the file and is not used; the tables of the noising process go without saying."""
    prefixes = tuple(prefix for _, prefix in places.values())
    rest = [name for name in header.tensors if not name.startswith(prefixes) and not _BESIDE.match(name)]
    ema = [name for name in rest if name.startswith("model_ema.")]
    other = [name for name in rest if not name.startswith("model_ema.")]
    notes = ["the 24th layer of its text encoder is not used by SD 2, and is in no file that is written from it"] \
        if "cond_stage_model.model.transformer.resblocks.23.ln_1.weight" in header.tensors else []
    notes += [f"it also has {len(ema)} tensors of a moving average (model_ema.), which are not used"] if ema else []
    return tuple(notes + ([f"{len(other)} tensors are of no part that is known here, for example {other[0]}"] if other else []))
