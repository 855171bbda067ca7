"""The names of a VAE: those of diffusers, which are ours, and those of LDM, which every other tool reads.

LDM counts the decoder's levels from the other end, and has 1 × 1 convolutions where diffusers has linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from torch import Tensor

ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# diffusers → LDM, one piece of a name after the other; N is a number that both have, L a level.
PIECES = (("down_blocks.L.", "down.L."), ("up_blocks.L.", "up.L."), ("mid_block.resnets.0.", "mid.block_1."),
          ("mid_block.resnets.1.", "mid.block_2."), ("mid_block.attentions.0.", "mid.attn_1."), ("resnets.N.", "block.N."),
          ("downsamplers.0.", "downsample."), ("upsamplers.0.", "upsample."), ("conv_shortcut.", "nin_shortcut."),
          ("conv_norm_out.", "norm_out."))


def is_vae(names: Iterable[str], ldm: bool) -> bool:
    """Whether these are the names of a whole VAE, in LDM's or in diffusers' way, and of nothing else."""
    names = list(names)
    level = r"decoder\.up\.\d" if ldm else r"decoder\.up_blocks\.\d"
    return all(name.startswith(ROOTS) for name in names) and any(re.match(level, name) for name in names)


def ldm_names(names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """diffusers' name of each tensor -> LDM's, and whether it is a linear layer here and a convolution there."""
    levels = _levels(names := list(names), r"decoder\.up_blocks\.(\d+)\.")
    return {name: (_renamed(name, PIECES, ATTENTION, levels), _linear(name, "mid_block.attentions.0.")) for name in names}


def to_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {ldm: tensors[name][..., None, None] if linear else tensors[name]
            for name, (ldm, linear) in ldm_names(tensors).items()}


def from_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """FinetuneError for an attention that is no 1 × 1 convolution."""
    levels, back = _levels(tensors, r"decoder\.up\.(\d+)\."), [(ldm, ours) for ours, ldm in PIECES]
    found = {}
    for name, t in tensors.items():
        if linear := _linear(name, "mid.attn_1."):
            if t.ndim > 2 and t[0, 0].numel() != 1:
                raise FinetuneError(f"{name} has the shape {tuple(t.shape)}: no 1 × 1 convolution")
        found[_renamed(name, back, {ldm: ours for ours, ldm in ATTENTION.items()}, levels)] = t.flatten(1) if linear else t
    return found


def _linear(name: str, attention: str) -> bool:
    return attention in name and name.endswith(".weight") and "norm" not in name


def _levels(names: Iterable[str], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in names if (found := re.match(pattern, name)))


def _renamed(name: str, pieces: Iterable[tuple[str, str]], attention: dict[str, str], levels: int) -> str:
    for old, new in pieces:
        pattern = r"(?<![^.])" + re.escape(old).replace("N", r"(\d+)").replace("L", r"(\d+)")

        def written(found: re.Match, old=old, new=new) -> str:
            if "L" not in old:
                return new.replace("N", found[1] if "N" in old else "")
            level = levels - 1 - int(found[1]) if old.startswith("up") else int(found[1])
            return new.replace("L", str(level))

        name = re.sub(pattern, written, name)
    if ".attn_1." in name or ".attentions.0." in name:
        for old, new in attention.items():
            name = re.sub(rf"(?<=\.){re.escape(old)}(?=\.(weight|bias)$)", new, name)
    return name
