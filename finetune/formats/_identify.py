"""What a header says that a file is, from names, shapes and metadata alone; nothing here imports torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

from finetune import registry
from finetune.formats._configs import peft_configs
from finetune.formats._dialects import plain
from finetune.formats._tokens import is_bare, is_named, shapes
from finetune.header import Header, read_header

# What a file is, by the first pattern that any of its tensors' names contains: pattern, kind, format if none here reads it.
_KINDS = (
    (r"\.dora_scale$", "dora", None),
    (r"\.hada_w1_", "loha", None),
    (r"\.lokr_w", "lokr", None),
    (r"\.oft_(blocks|R)\b", "oft", "peft"),
    (r"\.diff(_b)?$", "difference", None),
    (r"\.lora_(down|up|A|B)\b|[._]lora\.(down|up)\.|\.lora_linear_layer\.", "lora", None),
    (r"^(emb_params|clip_l|clip_g)$", "embedding", None),
    (r"^controlnet_cond_embedding\.", "control", "diffusers"),
    (r"^model\.diffusion_model\.", "checkpoint", "single_file"),
    (r"^first_stage_model\.|^(encoder\.down|decoder\.up)\.\d", "vae", "single_file"),
    (r"^(encoder\.down|decoder\.up)_blocks\.", "vae", "diffusers"),
    (r"^(down|up)_blocks\.\d+\.(attentions|resnets)\.", "unet", "diffusers"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.", "text encoder", "transformers"),
)
_PARTS = {
    "lora_unet": "denoiser", "unet": "denoiser", "transformer": "denoiser", "lora_transformer": "denoiser",
    "lora_te": "text", "lora_te1": "text", "text_encoder": "text",
    "lora_te2": "text_2", "text_encoder_2": "text_2", "text_encoder_3": "text_3",
}
_FAMILY_OF_VERSION = {
    "sd_v1": "sd1", "sd_v2": "sd2", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux",
    "stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3", "sd_x4_upscaler": "upscaler", "stable-diffusion-x4-upscaler": "upscaler",
}
_FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
WIDTHS_OF_SD3 = {1536, 2432}        # of the medium and the large models; FLUX has the same names, and 3072
# One tensor of every adapted module. The first group: those whose first axis is the rank, and whose second the input.
_ONE = re.compile(r"[._](lora_down|lora_A|lora\.down|lora_linear_layer\.down|hada_w1_b)\b|\.(lokr_w1(_a)?|oft_blocks|diff)$")


def identify(header: Header) -> dict:
    """What a header says: kind, format, family (None when unknown), ranks, alphas, modules by part."""
    as_given, header = header, plain(header)
    names = header.tensors
    kind, format_name = next(
        ((kind, form) for pattern, kind, form in _KINDS if any(re.search(pattern, name) for name in names)),
        (None, None),
    )
    if kind is None and is_named(shapes(header)):
        kind, format_name = "embedding", "diffusers"
    readers = (name for name in registry.names("formats") if registry.find("formats", name).reads(as_given))
    format_name = next(readers, format_name)
    ones = {name: found for name in names if (found := _ONE.search(name))}
    prefixes = Counter(re.match(r"lora_[^_]+|[^.]*", name)[0] for name in ones)
    parts: Counter[str] = Counter()
    for prefix, count in prefixes.items():
        parts[_PARTS.get(prefix, prefix)] += count
    return {
        "kind": kind,
        "format": format_name,
        "family": _family(header),
        "ranks": sorted({names[name][1][0] for name, found in ones.items() if found[1] and names[name][1]}),
        "alphas": _alphas(header),
        "modules": dict(sorted(parts.items())),
    }


def family_of(path: str | Path, said: str | None) -> str:
    """The family that a user said, or that the file's header tells; sd1 where neither does."""
    return said or identify(read_header(path))["family"] or "sd1"


def contradictions(header: Header) -> list[str]:
    """What the metadata say and the tensors do not. Of a small base's shapes nothing is known."""
    facts, shaped, said, found = identify(header), _family_of_shapes(plain(header)), header.metadata, []
    # Tokens of SDXL and of SD 3 look the same.
    if shaped and shaped != facts["family"] and not (facts["family"] == "sd3" and "clip_g" in header.tensors):
        found.append(f"its metadata say {facts['family']}, but its shapes are those of {shaped}")
    if facts["kind"] != "lora":
        return found
    ranks = [said.get("ss_network_dim", ""), *(str(config["r"]) for config in peft_configs(said).values()
                                               if "r" in config and not config.get("rank_pattern"))]
    found += [f"its metadata say rank {rank}, but its tensors have {_few(facts['ranks'])}" for rank in ranks
              if re.fullmatch(r"\d{1,9}", rank) and facts["ranks"] and int(rank) not in facts["ranks"]]
    # That of rsLoRA in LyCORIS is another in the file, an alpha in half precision is a little off, and 0 stands for the rank.
    alpha = said.get("ss_network_alpha", "")
    alphas = [value for name, value in header.scalars.items() if name.endswith(".alpha")]
    known = re.fullmatch(r"\d+(\.\d+)?", alpha) and float(alpha) and "rs_lora" not in said.get("ss_network_args", "")
    if known and alphas and not any(math.isclose(float(alpha), own, rel_tol=1e-2) for own in alphas):
        found.append(f"its metadata say alpha {alpha}, but its tensors have {_few(facts['alphas'])}")
    return found


def _few(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:5])


def _family(header: Header) -> str | None:
    """Metadata first: a width alone misleads for a small base."""
    said = header.metadata
    if "finetune.family" in said:
        return said["finetune.family"]
    version = said.get("ss_base_model_version") or said.get("modelspec.architecture") or ""
    known = next((family for start, family in _FAMILY_OF_VERSION.items() if version.startswith(start)), None)
    return known or _family_of_shapes(header)


def _family_of_shapes(header: Header) -> str | None:
    joint = {shape[-1] for name, (_, shape) in header.tensors.items()
             if re.fullmatch(r"transformer\.transformer_blocks\.\d+\.(attn|ff)[._].*lora_A", name) and shape}
    if any(name.startswith("transformer.joint_blocks.") for name in header.tensors) or joint & WIDTHS_OF_SD3:
        return "sd3"
    keys = [name for name in header.tensors if re.search(r"\.attn2\.to_k\.", name)]
    wide = [key for key in keys if (found := _ONE.search(key)) and found[1] or key.endswith(("to_k.weight", "to_k.diff"))]
    found = [header.tensors[key][1] for key in wide]
    if is_bare(header.tensors) or is_named(shapes(header)):
        found = [(2048,)] if "clip_g" in header.tensors else [*shapes(header).values()]
    family = next(filter(None, (_FAMILY_OF_WIDTH.get(shape[-1]) for shape in found if shape)), None)
    # Of SD 2 the lowest level has no attention; of the upscaler, as wide, the highest has none.
    lowest = any(re.search(r"(down_blocks\.3|up_blocks\.0)\.attentions", key) for key in keys)
    return "upscaler" if family == "sd2" and lowest else family


def _alphas(header: Header) -> list[int | float]:
    values = {value for name, value in header.scalars.items() if name.endswith(".alpha")}
    for config in peft_configs(header.metadata).values():
        values |= {config["lora_alpha"]} if "lora_alpha" in config else set()
        values |= set(config.get("alpha_pattern", {}).values())
    return [number(float(value)) for value in sorted(values)]


def number(value: float) -> int | float:
    """8 for 8.0, as other tools write it."""
    return int(value) if value.is_integer() else value
