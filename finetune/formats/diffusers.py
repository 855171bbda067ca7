"""The names of diffusers and peft: unet.down_blocks.0....to_k.lora_A.weight, the scale in the metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.artifact import Artifact, fold_alpha, modules
from finetune.families._vae import is_vae
from finetune.formats import _tokens
from finetune.formats._dialects import FLAT, place
from finetune.formats._configs import DIFFUSERS_METADATA
from finetune.formats._identify import number
from finetune.formats.base import CONTROL, bare, common_metadata, rank_and_alpha
from finetune.formats.base import decode  # noqa: F401, it reads what any tool has written
from finetune.header import Header

if TYPE_CHECKING:  # both cost an import of torch
    from torch import Tensor

    from finetune.families.base import FamilySpec

# Its loader refuses LoHa, LoKr, OFT and differences, and drops a dora_scale; `full` is a folder, see train/export.py, and so
# is a control branch, whose weights are one file in it.
KINDS = ("lora", "vae", "full", "embedding", "control")


def reads(header: Header) -> bool:
    """True for a header with dotted names of a LoRA, diffusers' of a VAE or a control branch, or a token under its name."""
    lora = any(place(name) and not FLAT.match(name) for name in header.tensors)
    return lora or CONTROL in header.tensors or is_vae(header.tensors, ldm=False) or _tokens.is_named(_tokens.shapes(header))


def encode(artifact: Artifact, spec: FamilySpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata): the alpha goes into `lora_adapter_metadata`, where diffusers looks for it."""
    assert artifact.kind != "full", "a whole model is saved by its family"
    if artifact.kind in ("vae", "control"):
        return bare(artifact), common_metadata(artifact, spec)
    if artifact.kind == "embedding":
        return _tokens.encode(artifact, spec, named=True), common_metadata(artifact, spec)
    artifact = replace(artifact, tensors=fold_alpha(artifact.tensors))
    rank, alpha = rank_and_alpha(artifact.tensors)
    tensors: dict[str, Tensor] = {}
    config: dict[str, object] = {}
    adapted = modules(artifact.tensors)
    for part in sorted({part for part, _ in adapted}):
        component = spec.components[part]
        ranks = {}
        for path, module in ((path, module) for (own, path), module in adapted.items() if own == part):
            tensors |= {f"{component}.{path}.{role}.weight": module[role] for role in ("lora_A", "lora_B")}
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
    return tensors, common_metadata(artifact, spec) | {DIFFUSERS_METADATA: json.dumps(config, sort_keys=True)}
