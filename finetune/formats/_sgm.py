"""The module names of SDXL's UNet in the code that it was published with, which is how every tool reads kohya's files."""

from finetune.families._original import RESNET, moved, unet_places

PLACES = unet_places(blocks=3, layers=2, attended={0, 1})


def to_sgm(path: str) -> str:
    return moved(path, PLACES)


def from_sgm(path: str) -> str:
    """Also for a path of diffusers, which stays as it is."""
    return moved(path, {theirs: ours for ours, theirs in PLACES.items()}, {theirs: ours for ours, theirs in RESNET.items()})
