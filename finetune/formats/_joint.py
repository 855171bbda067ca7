"""The names of SD 3's MM-DiT in the code that it was published with, in kohya's files; q, k and v are one layer there.

Three LoRAs side by side are one of three times the rank: A of q, k and v one below the other, and the blocks B of q, k and v
on a diagonal. A fused LoRA of others is three with one A and the rows of B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError
from finetune.families._original import JOINT, JOINT_FUSED, MMDIT

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL = "lora_unet_"             # the prefix that sd-scripts writes
PLAIN = "lora_transformer_"         # that of LyCORIS before the names of diffusers, for what cannot be fused
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"

PLACES: dict[str, list[str]] = {}   # their layer, the number of the block N -> ours, or our q, k and v
for _ours, _theirs in (MMDIT | {"context_embedder.": "context_embedder."}).items():
    PLACES[_theirs.rstrip(".").replace(".", "_")] = [_ours.rstrip(".")]
for _ours, _theirs in (JOINT | JOINT_FUSED).items():
    _theirs = "joint_blocks_N_" + _theirs.rstrip(".").replace(".", "_")
    PLACES.setdefault(_theirs, []).append(f"transformer_blocks.N.{_ours}".rstrip("."))
FOUND = {ours: theirs for theirs, several in PLACES.items() for ours in several}


def fused(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of a file, from the LoRA of each of our layers. FinetuneError for a layer that the original does not have."""
    groups: dict[tuple[str, str], dict[str, Mapping[str, Tensor]]] = {}
    for path, module in modules.items():
        block = re.match(r"transformer_blocks\.(\d+)\.", path)
        number = block[1] if block else ""
        general = path.replace(block[0], "transformer_blocks.N.") if block else path
        if general not in FOUND:
            raise FinetuneError(f"{path} is no layer of the original Stable Diffusion 3")
        groups.setdefault((FOUND[general], number), {})[general] = module
    tensors = {}
    for (theirs, number), group in groups.items():
        stem = f"{ORIGINAL}{theirs.replace('_N_', f'_{number}_')}"
        lora = _turned(next(iter(group)), next(iter(group.values()))) if len(PLACES[theirs]) == 1 else \
            _together(stem, [group.get(ours) for ours in PLACES[theirs]])
        tensors |= {f"{stem}.{role}": t for role, t in zip((DOWN, UP, ALPHA), lora)}
    return tensors


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file with each original layer's replaced by those of our layers, under PLAIN. FinetuneError for a change of
    q, k and v that is no LoRA."""
    result, layers = {}, {}
    for key, t in tensors.items():
        flat, _, role = key.removeprefix(ORIGINAL).partition(".")
        block = re.match(r"joint_blocks_(\d+)_", flat)
        general = flat.replace(block[0], "joint_blocks_N_") if block else flat
        if key.startswith(ORIGINAL) and general in PLACES:
            layers.setdefault((flat, general, block[1] if block else ""), {})[role] = t
        else:
            result[key] = t
    for (flat, general, number), roles in layers.items():
        paths = PLACES[general]
        names = [PLAIN + path.replace(".N.", f".{number}.").replace(".", "_") for path in paths]
        if len(paths) == 1:
            if {DOWN, UP} <= roles.keys():
                _, roles[UP], _ = _turned(paths[0], {"lora_A": roles[DOWN], "lora_B": roles[UP], "alpha": None})
            result |= {f"{names[0]}.{role}": t for role, t in roles.items()}
            continue
        if not {DOWN, UP} <= roles.keys() <= {DOWN, UP, ALPHA}:
            raise FinetuneError(f"{ORIGINAL}{flat} has {', '.join(sorted(roles))}: of the layer that is q, k and v at once "
                                "nothing but a LoRA can be taken apart")
        for name, lora in zip(names, _apart(roles[DOWN], roles[UP], roles.get(ALPHA))):
            if lora:
                result |= {f"{name}.{role}": t for role, t in zip((DOWN, UP, ALPHA), lora) if t is not None}
    return result


def _together(stem: str, loras: list[Mapping[str, Tensor] | None]) -> tuple[Tensor, Tensor, Tensor]:
    """One LoRA from those of q, k and v; zeros for one that is not there. FinetuneError for ranks that differ: the scale of a
    layer is alpha / rank, and there is one alpha."""
    import torch

    first = next(filter(None, loras))
    if len({len(lora["lora_A"]) for lora in loras if lora}) > 1:
        raise FinetuneError(f"{stem} is q, k and v at once, and their ranks differ: export as diffusers, or give them one rank")
    each = [lora or {role: torch.zeros_like(t) for role, t in first.items()} for lora in loras]
    alpha = first["alpha"] * len(loras)
    if not torch.equal(alpha / len(loras), first["alpha"]):      # float32 does not hold three times every number
        alpha = first["alpha"].double() * len(loras)
    return torch.cat([lora["lora_A"] for lora in each]), torch.block_diag(*(lora["lora_B"] for lora in each)), alpha


def _apart(down: Tensor, up: Tensor, alpha: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None] | None]:
    """The LoRAs of q, k and v; None for one that `_together` was not given."""
    import torch

    rows = up.chunk(3)
    if len(down) % 3 == 0 and up.shape[1] == len(down) and len(up) % 3 == 0:
        blocks = [row.chunk(3, 1)[i] for i, row in enumerate(rows)]
        if torch.equal(torch.block_diag(*blocks), up):
            own = alpha if alpha is None else alpha / 3
            return [(a, b, own) if a.any() else None for a, b in zip(down.chunk(3), blocks)]
    return [(down, row, alpha) for row in rows]


def _turned(path: str, lora: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The LoRA of one layer. A norm that ends the picture's or the text's way has shift and scale the other way round there;
    it has two rows for each column, where another has six or nine."""
    import torch

    a, b = lora["lora_A"], lora["lora_B"]
    if path.endswith(("norm_out.linear", "norm1_context.linear")) and len(b) == 2 * a.shape[1]:
        b = torch.cat(b.chunk(2)[::-1])
    return a, b, lora["alpha"]
