"""The names of diffusers and peft: unet.down_blocks.0....to_k.lora_A.weight, the scale in the metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.artifact import Artifact, Header, fold_alpha, modules, published
from finetune.families._vae import is_vae
from finetune.formats import _tokens
from finetune.formats._modules import ROLES
from finetune.formats.base import (
    CONTROL, DIFFUSERS_METADATA, Place, bare, common_metadata, gather, number, peft_configs, rank_and_alpha, whole_part,
)

if TYPE_CHECKING:  # both cost an import of torch
    from torch import Tensor

    from finetune.families.base import FamilySpec

# Its loader refuses LoHa, LoKr, OFT and differences, and drops a dora_scale; `full` is a folder, see train/export.py, and so
# is a control branch, whose weights are one file in it.
KINDS = ("lora", "vae", "full", "embedding", "control")
WRITTEN = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
# The first is what we write; diffusers' own scripts also write the others. What it would not load is read all the same.
SUFFIXES = {f".{role}": role for role in ROLES if role not in WRITTEN} | {
    ".lora_A.weight": "lora_A", ".lora.down.weight": "lora_A", ".lora_linear_layer.down.weight": "lora_A",
    ".lora_B.weight": "lora_B", ".lora.up.weight": "lora_B", ".lora_linear_layer.up.weight": "lora_B",
}


def reads(header: Header) -> bool:
    """True for a header with diffusers' names, of a LoRA, a VAE or a control branch, or a token under its name."""
    start = re.compile(r"(unet|transformer|text_encoder(_\d)?)\.")
    lora = any(start.match(name) and name.endswith(tuple(SUFFIXES)) for name in header.tensors)
    return lora or CONTROL in header.tensors or is_vae(header.tensors, ldm=False) or _tokens.is_named(_tokens.shapes(header))


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: FamilySpec) -> Artifact:
    """Scales come from `lora_adapter_metadata`; without it they are 1. FinetuneError as in `gather`."""
    if is_vae(tensors, ldm=False):
        return whole_part("vae", tensors, metadata, spec)
    if CONTROL in tensors:
        return whole_part("control", tensors, metadata, spec)
    if _tokens.is_named({name: t.shape for name, t in tensors.items()}):
        return _tokens.decode(tensors, metadata, spec)
    parts = {component: part for part, component in spec.components.items()}
    configs = peft_configs(metadata)

    def locate(key: str) -> Place | None:
        component, _, name = key.partition(".")
        for suffix, role in SUFFIXES.items():
            if component in parts and name.endswith(suffix):
                return parts[component], published(name.removesuffix(suffix)), role
        return None

    def alpha(part: str, path: str, rank: int) -> float:
        config = configs.get(spec.components[part], {})
        patterns = config.get("alpha_pattern", {}).items()
        # The rule is peft's.
        matching = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", path))
        value = next(matching, config.get("lora_alpha", config.get("alpha", rank)))
        return value * math.sqrt(rank) if config.get("use_rslora") else value

    return gather(tensors, metadata, spec, locate, alpha)


def encode(artifact: Artifact, spec: FamilySpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata): the alpha goes into `lora_adapter_metadata`, where diffusers looks for it."""
    assert artifact.kind != "full", "a whole model is saved by its family"
    if artifact.kind in ("vae", "control"):
        return bare(artifact), common_metadata(artifact)
    if artifact.kind == "embedding":
        return _tokens.encode(artifact, spec, named=True), common_metadata(artifact)
    folded = fold_alpha(artifact.tensors)
    rank, alpha = rank_and_alpha(folded)
    tensors: dict[str, Tensor] = {}
    config: dict[str, object] = {}
    adapted = modules(folded)
    for part in sorted({part for part, _ in adapted}):
        component = spec.components[part]
        ranks = {}
        for path, module in ((path, module) for (own, path), module in adapted.items() if own == part):
            for role, suffix in WRITTEN.items():
                tensors[f"{component}.{path}{suffix}"] = module[role]
            # peft matches whole ends of module names: without text_model. this fits every transformers.
            ranks[path.removeprefix("text_model.")] = module["lora_A"].shape[0]
        # Older versions of peft refuse a field they do not know: no more than these.
        settings = {
            "r": rank,
            "lora_alpha": number(alpha),
            "target_modules": list(ranks),
            "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
            "alpha_pattern": {},
            "bias": "none",
            "init_lora_weights": True,
            "lora_bias": False,
            "use_dora": False,
            "use_rslora": False,
        }
        config |= {f"{component}.{field}": value for field, value in settings.items()}
    return tensors, common_metadata(artifact) | {DIFFUSERS_METADATA: json.dumps(config, sort_keys=True)}
