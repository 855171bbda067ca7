"""The names of sd-scripts and LyCORIS, which most tools read: lora_unet_down_blocks_0_..._to_k.lora_down.weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.artifact import Artifact, Header, fold_alpha, modules, published
from finetune.families._vae import from_ldm, is_vae
from finetune.formats import _joint, _tokens
from finetune.formats._modules import KINDS as _KINDS
from finetune.formats._modules import ROLES
from finetune.formats._sgm import from_sgm, to_sgm
from finetune.formats.base import Place, common_metadata, gather, ldm_vae, number, rank_and_alpha, whole_part

if TYPE_CHECKING:  # both cost an import of torch
    from torch import Tensor

    from finetune.families.base import FamilySpec

KINDS = (*_KINDS.values(), "vae", "embedding")
# What sd-scripts and LyCORIS write behind a module's name, and the role that it is here.
SUFFIXES = {role: role for role in ROLES} | {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B",
                                             "lora_mid.weight": "lora_mid"}
WRITTEN = {role: suffix for suffix, role in SUFFIXES.items()}

# A kohya file does not say which of its underscores were dots: these are the names between the dots, in the
# UNets and the MM-DiT of diffusers and in CLIP's text models, and for SDXL also those of SGM.
SEGMENTS = """
    down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks
    attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out
    conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj
    time_embedding add_embedding class_embedding linear_1 linear_2
    attn add_q_proj add_k_proj add_v_proj to_add_out ff_context norm1 norm1_context norm_out linear
    pos_embed context_embedder time_text_embed timestep_embedder text_embedder
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
""".split()
SGM = "input_blocks middle_block output_blocks time_embed label_emb out in_layers emb_layers out_layers skip_connection op".split()
SEGMENT = {sgm: rf"(?:{'|'.join(sorted(SEGMENTS + SGM * sgm, key=len, reverse=True))}|\d+)(?=_|$)" for sgm in (False, True)}


def reads(header: Header) -> bool:
    """True for a header with the names of sd-scripts or LyCORIS, a VAE's in the way of LDM, or a token without its name."""
    found = (re.fullmatch(r"lora_(?:unet|transformer|te\d?)_[^.]*\.(.*)", name) for name in header.tensors)
    return any(name and name[1] in SUFFIXES for name in found) or is_vae(header.tensors, ldm=True) or \
        _tokens.is_bare(header.tensors)


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: FamilySpec) -> Artifact:
    """Alphas that differ are folded into lora_B; no alpha means scale 1. FinetuneError as in `gather`."""
    if is_vae(tensors, ldm=True):
        return whole_part("vae", from_ldm(tensors), metadata, spec)
    if _tokens.is_bare(tensors):
        return _tokens.decode(tensors, metadata, spec)
    # Some trainers use SDXL's prefix for the one text encoder of SD 1.
    prefixes = {prefix: part for part, prefix in spec.kohya.items()} | {"lora_te1": "text"}
    if spec.joint:
        tensors, prefixes = _joint.split(tensors), prefixes | {_joint.PLAIN.rstrip("_"): "denoiser"}

    def locate(key: str) -> Place | None:
        module, _, role = key.partition(".")
        for prefix, part in prefixes.items():
            path = _dotted(module.removeprefix(f"{prefix}_"), spec.sgm) if module.startswith(f"{prefix}_") else None
            if path and role in SUFFIXES:
                path = from_sgm(path) if spec.sgm and part == "denoiser" else published(path)
                return part, path, SUFFIXES[role]
        return None

    return gather(tensors, metadata, spec, locate)


def encode(artifact: Artifact, spec: FamilySpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) as sd-scripts and LyCORIS write them, always with alphas, and the same for every run."""
    if artifact.kind == "vae":
        return ldm_vae(artifact, spec)
    if artifact.kind == "embedding":
        said = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{spec.architecture}/textual-inversion",
                "ss_base_model_version": spec.base_version}
        return _tokens.encode(artifact, spec, named=False), common_metadata(artifact) | said
    folded = fold_alpha(artifact.tensors)
    found, tensors = modules(folded), {}
    prefixes = spec.kohya
    if spec.joint and artifact.kind == "lora":
        tensors = _joint.fused({path: found.pop((part, path)) for part, path in list(found) if part == "denoiser"})
    elif spec.joint:        # what cannot be fused
        prefixes = prefixes | {"denoiser": _joint.PLAIN.rstrip("_")}
    for (part, path), module in found.items():
        path = to_sgm(path) if spec.sgm and part == "denoiser" else path
        flat = path.replace(".", "_")
        assert _dotted(flat, spec.sgm) == path, f"SEGMENTS lacks the names to read {flat!r} back as {path!r}"
        for role, tensor in module.items():
            tensors[f"{prefixes[part]}_{flat}.{WRITTEN[role]}"] = tensor
    return tensors, common_metadata(artifact) | _metadata(artifact, folded, spec)


def _dotted(flat: str, sgm: bool = False) -> str | None:
    """down_blocks_0_attentions_1 -> down_blocks.0.attentions.1; None for a name outside the table."""
    segment = SEGMENT[sgm]
    if not re.fullmatch(rf"{segment}(?:_{segment})*", flat):
        return None
    return ".".join(re.findall(rf"(?:^|_)({segment})", flat))


def _metadata(artifact: Artifact, tensors: Mapping[str, Tensor], spec: FamilySpec) -> dict[str, str]:
    """What A1111, Forge and SD.Next sort and label adapters by."""
    size = rank_and_alpha(tensors)
    ranked = {"ss_network_dim": str(size[0]), "ss_network_alpha": str(number(size[1]))} if size else {}
    title = artifact.metadata.get("ss_output_name", f"{spec.name} LoRA")
    return ranked | {
        "ss_base_model_version": spec.base_version,
        "ss_v2": str(spec.base_version.startswith("sd_v2")),
        "ss_network_module": "networks.lora" if artifact.kind == "lora" else "lycoris.kohya",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{spec.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": artifact.metadata.get("modelspec.title", title),
    }
