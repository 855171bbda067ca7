"""A control branch (ControlNet, Zhang et al. 2023): a copy of a UNet's first half that also sees a condition picture, and adds
what it makes of it to what the frozen UNet's second half is given. Layers of zeros stand at its end, so that it begins with
no effect.

Shapes: B batch · C latent channels · H W pixels · h w = H W / VAE stride.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.errors import FinetuneError

WIDTHS = (16, 32, 96, 256)      # of the layers from pixels to latents; the sides are halved between two of them
ENDS = ("controlnet_down_blocks.", "controlnet_mid_block.")
EMBEDDING = "control.controlnet_cond_embedding."


def branch(unet: nn.Module, widths: tuple[int, ...], copied: bool = True) -> nn.Module:
    """A frozen branch for this UNet in float32: its layers copied, or drawn as diffusers does."""
    import diffusers

    if not isinstance(unet, diffusers.UNet2DConditionModel):
        raise FinetuneError("method.kind: control is for sd1, sd2 and sdxl: the denoiser of this base is no UNet")
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=copied)
    return made.float().requires_grad_(False).eval()


def empty(unet: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The branch that weights of these shapes are for, on the meta device."""
    strided = (f"{EMBEDDING}blocks.{number}.weight" for number in range(1, 2 * len(WIDTHS), 2))
    names = [name for name in (f"{EMBEDDING}conv_in.weight", *strided) if name in tensors]
    with torch.device("meta"):
        return branch(unet, tuple(tensors[name].shape[0] for name in names) or WIDTHS, copied=False)


def misfits(unet: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The weights of a branch that is none of this UNet's."""
    wanted = {f"control.{name}": p.shape for name, p in empty(unet, tensors).state_dict().items()}
    return [f"{name}: {'not in the file' if name not in tensors else 'the base has it otherwise'}"
            for name in sorted(wanted.keys() | tensors.keys())
            if name not in tensors or tensors[name].shape != wanted.get(name)]


@contextmanager
def added(family, branches: list[tuple[Mapping[str, Tensor], float]]) -> Iterator[None]:
    """Inside, the family has this branch, if there is one, at its strength. Raises FinetuneError for several."""
    if len(branches) > 1:
        raise FinetuneError("one control branch can be followed at a time; name one of them")
    before = {"control": family.parts["control"]} if "control" in family.parts else {}
    for tensors, strength in branches:
        unet = family.parts["denoiser"]
        made, like = empty(unet, tensors), next(p for p in unet.parameters() if p.is_floating_point())
        own = {name.removeprefix("control."): t.to(like, copy=True) for name, t in tensors.items()}
        made.load_state_dict(own, assign=True)
        scale(made, strength)
        family.parts["control"] = made
    try:
        yield
    finally:
        if branches:
            del family.parts["control"]
            family.parts.update(before)


@torch.no_grad()
def scale(branch: nn.Module, strength: float) -> None:
    """Have all that a branch adds count so often: its last layers are linear."""
    for name, p in branch.named_parameters():
        if name.startswith(ENDS):
            p.mul_(strength)


def residuals(branch: nn.Module, x_BChw: Tensor, t_B: Tensor, tokens_BLD: Tensor, control_B3HW: Tensor,
              added: dict[str, dict[str, Tensor]]) -> dict[str, object]:
    """What the branch adds, as the UNet's arguments. It may be of another format, in training of float32."""
    own = next(branch.parameters()).dtype
    down, middle = branch(x_BChw.to(own), t_B, tokens_BLD.to(own), control_B3HW.to(own), **added, return_dict=False)
    return {"down_block_additional_residuals": [t.to(x_BChw.dtype) for t in down],
            "mid_block_additional_residual": middle.to(x_BChw.dtype)}
