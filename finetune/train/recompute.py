"""Activations that the backward pass computes a second time, where forward would keep them: `train.gradient_checkpointing`.

Chen et al. 2016 (arXiv 1604.06174). `selective` keeps, within each block, what is dear to make for its size: attention, and
products that sum over many numbers. Norms, activations and the wide but shallow layers of the transformers come again.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

LONG = 2048     # numbers that go into each one of a product from which on it is kept
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "mkldnn::_linear_pointwise": 0}      # the place of the operand that is summed over


def recompute(part: nn.Module, how: bool | str) -> None:
    """Have the blocks of a model of diffusers compute twice: all of it, or what is cheap if `how` is "selective"."""
    how = partial(checkpoint, use_reentrant=False, **({"context_fn": selected} if how == "selective" else {}))
    part.enable_gradient_checkpointing(how)


def selected() -> tuple:
    return create_selective_checkpoint_contexts(kept)


def kept(_, op: torch._ops.OpOverload, *args, **kwargs) -> CheckpointPolicy:
    """Whether what the operation makes is kept."""
    name, _, _ = op.name().partition(".")
    if name == "aten::convolution":
        length = args[1][0].numel()
    elif name in PRODUCTS:
        length = args[PRODUCTS[name]].shape[-1]
    else:
        length = LONG if name.startswith("aten::_scaled_dot_product") else 0
    return CheckpointPolicy.MUST_SAVE if length >= LONG else CheckpointPolicy.PREFER_RECOMPUTE
