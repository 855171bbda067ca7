"""The layers of SD 3's MM-DiT in the code that it was published with, which has q, k and v as one.

Three LoRAs side by side are one of three times the rank: A of q, k and v one below the other, and the blocks B of q, k and v
on a diagonal. A change of others is three, each with its own rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.artifact import modules
from finetune.errors import FinetuneError
from finetune.families._original import JOINT, JOINT_FUSED, MMDIT
from finetune.formats._modules import settle

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.change import Roles

PLACES: dict[str, list[str]] = {}   # their layer, N the number of its block -> ours, or our q, k and v
for _ours, _theirs in (MMDIT | {"context_embedder.": "context_embedder."}).items():
    PLACES[_theirs.rstrip(".")] = [_ours.rstrip(".")]
for _ours, _theirs in (JOINT | JOINT_FUSED).items():
    PLACES.setdefault(f"joint_blocks.N.{_theirs.rstrip('.')}", []).append(f"transformer_blocks.N.{_ours.rstrip('.')}")
FOUND = {ours: theirs for theirs, several in PLACES.items() for ours in several}
PLACES |= {f"{theirs}.{i}": [ours] for theirs, several in PLACES.items() if len(several) == 3       # OneTrainer's
           for i, ours in enumerate(several)}
ROWS = ("lora_B", "hada_w1_a", "hada_w2_a", "diff", "diff_b")       # roles that have the rows of the weight
SHARED = ("lora_A", "lora_mid", "hada_w1_b", "hada_w2_b", "alpha")   # those that each part of these rows has as well


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors of a LoRA with our layers of the denoiser replaced by the original ones. FinetuneError for a layer
    that the original does not have."""
    groups: dict[tuple[str, str], dict[str, Roles]] = {}
    result = {name: t for name, t in tensors.items() if not name.startswith("denoiser.")}
    for (part, path), module in modules(tensors).items():
        general, number = _general(path)
        if part != "denoiser":
            continue
        if general not in FOUND:
            raise FinetuneError(f"{path} is no layer of the original Stable Diffusion 3")
        groups.setdefault((FOUND[general], number), {})[general] = module
    for (theirs, number), group in groups.items():
        path, ours = theirs.replace(".N.", f".{number}."), PLACES[theirs]
        lora = _turned(ours[0], group[ours[0]]) if len(ours) == 1 else _together(path, [group.get(own) for own in ours])
        result |= {f"denoiser.{path}.{role}": t for role, t in lora.items()}
    return result


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors of a file (see `_dialects`) with each original layer's replaced by those of our layers. FinetuneError
    for a change of q, k and v that is none of each."""
    result = {}
    for (component, path), roles in modules(tensors).items():
        general, number = _general(path)
        several = PLACES.get(general, []) if component == "transformer" else []
        changes = [roles] if not several else [_turned(several[0], roles)] if len(several) == 1 else _apart(path, roles)
        for ours, change in zip(several or [path], changes):
            stem = f"{component}.{ours.replace('.N.', f'.{number}.')}"
            result |= {f"{stem}.{role}": t for role, t in change.items()}
    return result


def _general(path: str) -> tuple[str, str]:
    """joint_blocks.3.x_block.attn.qkv -> joint_blocks.N.x_block.attn.qkv and 3"""
    block = re.match(r"(joint_blocks|transformer_blocks)\.(\d+)\.", path)
    return (f"{block[1]}.N.{path[block.end():]}", block[2]) if block else (path, "")


def _together(path: str, loras: list[Roles | None]) -> dict[str, Tensor]:
    """One LoRA from those of q, k and v; zeros for one that is not there. FinetuneError for ranks that differ: the scale of a
    layer is alpha / rank, and there is one alpha."""
    import torch

    first = next(filter(None, loras))
    if len({len(lora["lora_A"]) for lora in loras if lora}) > 1:
        raise FinetuneError(f"{path} is q, k and v at once, and their ranks differ: export as diffusers (of a file: "
                            "finetune convert --to diffusers), or give them one rank")
    each = [lora or {role: torch.zeros_like(t) for role, t in first.items()} for lora in loras]
    alpha = first["alpha"] * len(loras)
    if not torch.equal(alpha / len(loras), first["alpha"]):      # float32 does not hold three times every number
        alpha = first["alpha"].double() * len(loras)
    return {"lora_A": torch.cat([lora["lora_A"] for lora in each]),
            "lora_B": torch.block_diag(*(lora["lora_B"] for lora in each)), "alpha": alpha}


def _apart(path: str, roles: Roles) -> list[Roles]:
    """The changes of q, k and v; an empty one for what `_together` was not given."""
    import torch

    roles = _multiplied_out(path, roles)
    parts, down = _bands(path, roles, 3), roles.get("lora_A")
    if roles.keys() - {"alpha"} == {"lora_A", "lora_B"} and down.ndim == 2 and len(down) % 3 == 0 \
            and roles["lora_B"].shape[1:] == down.shape[:1]:
        blocks = [part["lora_B"].chunk(3, 1)[i] for i, part in enumerate(parts)]
        if torch.equal(torch.block_diag(*blocks), roles["lora_B"]):
            alpha = {"alpha": roles["alpha"] / 3} if "alpha" in roles else {}
            return [{"lora_A": a, "lora_B": b} | alpha if a.any() else {} for a, b in zip(down.chunk(3), blocks)]
    return parts


def _turned(path: str, roles: Roles) -> Roles:
    """The change of one layer. A norm that ends the picture's or the text's way has shift and scale the other way round there;
    it has two rows for each column, where another has six or nine."""
    import torch

    if not path.endswith(("norm_out.linear", "norm1_context.linear")):
        return roles
    roles = _multiplied_out(path, roles)
    columns = next((roles[role].shape[-1] for role in ("lora_A", "hada_w1_b", "diff")
                    if role in roles and roles[role].ndim), None)
    rows = next((len(roles[role]) for role in ROWS if role in roles and roles[role].ndim), 0)
    if columns and rows != 2 * columns:
        return roles
    first, second = _bands(path, roles, 2)
    return {role: t if role in SHARED else torch.cat([second[role], t]) for role, t in first.items()}


def _multiplied_out(path: str, roles: Roles) -> Roles:
    """A LoKr, whose rows hang together, as the difference that it is."""
    from finetune.change import core

    if "dora_scale" in roles or not any(role.startswith("lokr_") for role in roles):
        return roles
    return {"diff": core(settle(path, roles, float))} | {role: t for role, t in roles.items() if role == "diff_b"}


def _bands(path: str, roles: Roles, count: int) -> list[dict[str, Tensor]]:
    """The change of each of so many equal bands of rows. FinetuneError for one whose rows hang together."""
    by_row = {role for role, t in roles.items() if role in ROWS or role == "dora_scale" and t.shape[:1] == (t.numel(),)}
    if other := sorted(roles.keys() - by_row - set(SHARED)):
        raise FinetuneError(f"{path} is {count} layers at once, and a change with {', '.join(other)} cannot be taken apart")
    if odd := [role for role in by_row if roles[role].ndim == 0 or len(roles[role]) % count]:
        raise FinetuneError(f"{path} is {count} layers at once, and the rows of its {odd[0]} are no multiple of {count}")
    return [{role: t.chunk(count)[i] if role in by_row else t for role, t in roles.items()} for i in range(count)]
