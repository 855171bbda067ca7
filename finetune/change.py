"""What an adapter does to a weight: one formula for each way to write a change down.

At strength s a weight W becomes W + s·change, whatever the kind: what ComfyUI, A1111, Forge, SD.Next and InvokeAI make of
these tensors at 1, and their rule for other strengths.

    LoRA        alpha/r · B A                               Hu et al. 2021
    LoHa        alpha/r · (w1_a w1_b) ∘ (w2_a w2_b)         Hyeon-Woo et al. 2021, eq. 4
    LoKr        w1 ⊗ w2                                     Yeh et al. 2023 (LyCORIS)
    OFT         Rᵀ W − W,  R = (1 + Q)(1 − Q)⁻¹,  Q = S − Sᵀ    Qiu et al. 2023, on blocks of rows
    difference  itself
    DoRA        m · (W + C)/‖W + C‖ − W, with C one of the above    Liu et al. 2024, eq. 5

Shapes: O I rows and columns of the weight, of a convolution with the kernel K K behind them · r rank · k blocks of n rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Roles = Mapping[str, Tensor]        # of one module: the last word of each tensor's name -> the tensor


def change(module: Roles, weight: Tensor) -> Tensor:
    """What is added to the weight at strength 1, float32 in the weight's shape."""
    weight = weight.detach().float()
    found = core(module).to(weight.device)
    if "oft_blocks" in module:
        found = torch.einsum("knm,kn...->km...", found, weight.unflatten(0, found.shape[:2])).flatten(0, 1)
    found = found.reshape(weight.shape)
    if "dora_scale" in module:
        magnitude = module["dora_scale"].to(weight)
        turned = weight + found
        found = turned * (magnitude / lengths(turned, int(magnitude.shape[0] == 1))) - weight
    return found


def core(module: Roles) -> Tensor:
    """The change as far as no weight is needed for it, float32: all of it, but of a DoRA the part before its magnitudes,
    and of an OFT its rotations less one, (k, n, n). It is zero where the adapter does nothing."""
    t = {role: tensor.float() for role, tensor in module.items()}
    if "lora_B" in t:
        down, up = t["lora_A"], t["lora_B"]
        product = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
        return product * (t["alpha"] / down.shape[0])
    if "hada_w1_a" in t:
        product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        return product * (t["alpha"] / t["hada_w1_b"].shape[0])
    if "lokr_w1" in t:
        kernel = [1] * (t["lokr_w2"].ndim - 2)
        return torch.kron(t["lokr_w1"].reshape(*t["lokr_w1"].shape, *kernel), t["lokr_w2"])
    if "oft_blocks" in t:
        return rotations(t["oft_blocks"]) - torch.eye(t["oft_blocks"].shape[1], device=t["oft_blocks"].device)
    return t["diff"]


def rotations(blocks_knn: Tensor) -> Tensor:
    """R, by the Cayley transform: orthogonal whatever the blocks hold, and 1 where they are zero."""
    skew = blocks_knn - blocks_knn.mT
    one = torch.eye(skew.shape[1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(one - skew, one + skew, left=False)


def lengths(weight: Tensor, kept: int = 1) -> Tensor:
    """The norm of each column of a weight over its rows (and kernel), (1, I[, 1, 1]); with kept=0 of each row. Never 0."""
    over = [axis for axis in range(weight.ndim) if axis != kept]
    return torch.linalg.vector_norm(weight, dim=over, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def misfit(module: Roles, weight: Tensor) -> str:
    """Why the change cannot be made to this weight, or nothing."""
    shape = tuple(weight.shape)
    own = tuple(core({role: t.to("meta") for role, t in module.items()}).shape)
    if "oft_blocks" in module and own[0] * own[1] != shape[0]:
        return f"{own[0]} blocks of {own[1]} rows, but the base has {shape[0]} rows"
    if "oft_blocks" not in module and own not in (shape, (shape[0], weight[0].numel())):
        return f"shape {own}, but the base has {shape}"
    magnitude = module.get("dora_scale")
    if magnitude is not None and tuple(magnitude.shape) not in [tuple(lengths(weight.to("meta"), i).shape) for i in (0, 1)]:
        return f"magnitudes of shape {tuple(magnitude.shape)}, but the base has {shape}"
    return ""
