"""The names of sd-scripts and LyCORIS, which most tools read: lora_unet_down_blocks_0_..._to_k.lora_down.weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.artifact import Artifact, fold_alpha, modules
from finetune.errors import FinetuneError
from finetune.families._vae import is_vae
from finetune.formats import _joint, _tokens
from finetune.formats._dialects import FLAT, NORMS, dotted, place, to_sgm
from finetune.formats._modules import KINDS as _KINDS
from finetune.formats._modules import ROLES
from finetune.formats.base import common_metadata, decode, ldm_vae  # noqa: F401, it reads what any tool has written
from finetune.header import Header

if TYPE_CHECKING:  # both cost an import of torch
    from torch import Tensor

    from finetune.families.base import FamilySpec

KINDS = (*dict.fromkeys(_KINDS.values()), "vae", "embedding")
WRITTEN = {role: role for role in ROLES} | {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
OF_NORMS = {ours: theirs for theirs, ours in NORMS.items()}
T5 = {"text_3": "lora_te3"}     # nothing here trains it, but others do
PLAIN = "lora_transformer"      # the prefix of LyCORIS before the names of diffusers, for what cannot be fused


def reads(header: Header) -> bool:
    """True for a header with the names of sd-scripts or LyCORIS, a VAE's in the way of LDM, or a token without its name."""
    flat = any(FLAT.match(name) and place(name) for name in header.tensors)
    return flat or is_vae(header.tensors, ldm=True) or _tokens.is_bare(header.tensors)


def encode(artifact: Artifact, spec: FamilySpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) as sd-scripts and LyCORIS write them, always with alphas, and the same for every run."""
    if artifact.kind == "vae":
        return ldm_vae(artifact, spec)
    if artifact.kind == "embedding":
        return _tokens.encode(artifact, spec, named=False), common_metadata(artifact, spec)
    folded, tensors, prefixes = fold_alpha(artifact.tensors), {}, T5 | spec.kohya
    if spec.joint and artifact.kind == "lora":
        folded = _joint.fused(folded)
    elif spec.joint:
        prefixes = prefixes | {"denoiser": PLAIN}
    for (part, path), module in modules(folded).items():
        path = to_sgm(path) if spec.sgm and part == "denoiser" else path
        flat = path.replace(".", "_")
        if dotted(flat) != path:
            raise FinetuneError(f"{part}.{path}: is no layer that has a name in kohya's files, where dots are underscores")
        words = WRITTEN | OF_NORMS if "diff" in module and module["diff"].ndim == 1 else WRITTEN
        tensors |= {f"{prefixes[part]}_{flat}.{words[role]}": tensor for role, tensor in module.items()}
    said = {"ss_network_module": "networks.lora" if artifact.kind == "lora" else "lycoris.kohya"}
    return tensors, common_metadata(replace(artifact, tensors=folded), spec) | said
