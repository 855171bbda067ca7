"""One module of an adapter file: is it whole, and how is it said in the roles of an Artifact.

LyCORIS and sd-scripts know several spellings of one change. What is multiplied out here becomes an equal one that more
tools read: Tucker's core goes into the side of the inputs, the factors of a LoKr become its two whole matrices, and its
scale goes into the first of them, since tools ignore the alpha of a LoKr whose matrices are whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from torch import Tensor

# The kinds, by a role that only they have; of a file that mixes them the first counts.
KINDS = {"dora_scale": "dora", "hada_w1_a": "loha", "lokr_w1": "lokr", "oft_blocks": "oft", "diff": "difference",
         "diff_b": "difference", "lora_A": "lora"}
# What a module has of one kind: all of a row, and beside it no more than alpha, dora_scale and diff_b.
WHOLE = (("lora_A", "lora_B"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2"),
         ("oft_blocks",), ("diff",))
# Further roles that a file may have, and that are multiplied out.
FACTORS = ("lora_mid", "hada_t1", "hada_t2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ROLES = (*(role for row in WHOLE for role in row), *FACTORS, "alpha", "dora_scale", "diff_b")
MOST_SCALE = 1e4            # alpha / rank
MOST_NUMBERS = 2 ** 28      # in a weight: the largest of the families here has 2 ** 24
SAID = {"lora_A": "its down half (lora_A)", "lora_B": "its up half (lora_B)"}


def kind_of(names: Iterable[str]) -> str:
    """The kind of an adapter with these canonical names."""
    roles = {name.rpartition(".")[2] for name in names}
    return next(kind for role, kind in KINDS.items() if role in roles)


def settle(stem: str, found: Mapping[str, Tensor], alpha: Callable[[int], float]) -> dict[str, Tensor]:
    """The module in the roles of an Artifact; `alpha(rank)` is for a file that has none.

    FinetuneError for a module that is not whole, or whose tensors do not fit each other."""
    import torch

    from finetune.change import core

    shapes = " and ".join(str(tuple(t.shape)) for role, t in found.items() if role != "alpha")
    try:
        if odd := [role for role, tensor in found.items() if not (tensor.is_floating_point() or role == "alpha")]:
            dtype = str(found[odd[0]].dtype).removeprefix("torch.")
            raise FinetuneError(f"{stem}.{odd[0]} has numbers of the type {dtype}: nothing trained")
        # Numbers of 8 bits are all there in 16, and can be reckoned with.
        t, scale = _multiplied_out({role: tensor.half() if tensor.itemsize == 1 else tensor for role, tensor in found.items()})
        wanted = max(WHOLE, key=lambda row: sum(role in t for role in row))
        if not t.keys() & set(wanted):
            raise FinetuneError(f"{stem} has nothing but {', '.join(sorted(t))}: the file is incomplete")
        if missing := [role for role in wanted if role not in t]:
            said = ", ".join(SAID.get(role, role) for role in missing)
            raise FinetuneError(f"{stem} lacks {said}: the file is incomplete")
        if more := sorted(t.keys() - {*wanted, "alpha", "dora_scale", "diff_b"}):
            raise FinetuneError(f"{stem} has {', '.join(more)} beside {', '.join(wanted)}: which change is meant?")
        rank = (t.get("lora_A", t.get("hada_w1_b", t[wanted[0]])).shape or (0,))[0]
        given = torch.as_tensor(t.pop("alpha") if "alpha" in t else alpha(rank), dtype=torch.float32)
        if given.numel() != 1:
            raise FinetuneError(f"{stem}.alpha is not one number but {tuple(given.shape)}")
        given = given.reshape(())
        if not abs(given / max(rank, 1)) <= (MOST_SCALE if {"lora_A", "hada_w1_a"} & t.keys() else math.inf):
            raise FinetuneError(f"{stem}.alpha is {given:g} for rank {rank}: no scale that anyone trained with")
        if "oft_blocks" in t and "alpha" in found and given > 0:
            raise FinetuneError(f"{stem}: a constrained OFT (alpha {given:g}), which every tool applies in another way")
        if "lokr_w1" in t and scale:
            t["lokr_w1"] = t["lokr_w1"] * (given / scale if "alpha" in found else 1.0)
        if "diff" not in t:
            fixed = {"lokr_w1": 1.0, "oft_blocks": 0.0}.get(wanted[0])
            t["alpha"] = given if fixed is None else torch.tensor(fixed)
        if "dora_scale" in t and t["dora_scale"].ndim < 2:
            raise FinetuneError(f"{stem}.dora_scale has the shape {tuple(t['dora_scale'].shape)}: of rows or of columns?")
        if "oft_blocks" in t and t["oft_blocks"].ndim != 3:
            raise FinetuneError(f"{stem}.oft_blocks has the shape {tuple(t['oft_blocks'].shape)}: a BOFT, which is not read")
        flat = {"diff": 1, "diff_b": 1, "alpha": 0}
        if not rank or any(tensor.ndim < flat.get(role, 2) for role, tensor in t.items()):
            raise IndexError
        if (size := core({role: tensor.to("meta") for role, tensor in t.items()}).numel()) > MOST_NUMBERS:
            raise FinetuneError(f"{stem}: tensors of {shapes} make a change of {size:,} numbers: more than any layer has")
    except (RuntimeError, IndexError):
        raise FinetuneError(f"{stem}: tensors of {shapes} do not fit each other") from None
    return t


def _multiplied_out(t: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Without FACTORS, and the rank that a LoKr's alpha is to be divided by: 0 for one without a rank."""
    import torch

    rank = 0
    if {"lora_mid", "lora_A"} <= t.keys():
        t["lora_A"] = torch.einsum("mn...,nj->mj...", t.pop("lora_mid").float(), t["lora_A"].flatten(1).float())
    for i in "12":
        if {f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b"} <= t.keys():
            tucker = torch.einsum("ij...,jr->ir...", t.pop(f"hada_t{i}").float(), t[f"hada_w{i}_b"].float())
            t |= {f"hada_w{i}_a": t[f"hada_w{i}_a"].float().mT, f"hada_w{i}_b": tucker.flatten(1)}
        if {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= t.keys():
            left, right = (t.pop(f"lokr_w{i}_{side}").float() for side in "ab")
            rank = right.shape[0]
            core = t.pop("lokr_t2", None) if i == "2" else None
            t[f"lokr_w{i}"] = left @ right if core is None else torch.einsum("ij...,jr,ip->pr...", core.float(), right, left)
    return {role: tensor.contiguous() for role, tensor in t.items()}, rank
