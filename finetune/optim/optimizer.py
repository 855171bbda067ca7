"""Optimizers by name, and their state as plain tensors."""

import torch
from torch import Tensor

from finetune.errors import FinetuneError


def adamw(groups: list[dict], **options) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), one fused kernel for all parameters."""
    return torch.optim.AdamW(groups, fused=True, **options)


def adamw8bit(groups: list[dict], **options) -> torch.optim.Optimizer:
    """AdamW with blockwise 8-bit state (Dettmers et al. 2022). `min_8bit_size=1`: by default bitsandbytes keeps 32 bits
    for parameters below 4 096 elements, which most LoRA matrices are, and says nothing."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise FinetuneError("train.optimizer: adamw8bit needs bitsandbytes: pip install 'finetune[8bit]'") from None
    return AdamW8bit(groups, min_8bit_size=1, **options)


OPTIMIZERS = {"adamw": adamw, "adamw8bit": adamw8bit}


def state_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """The state as named tensors, and the plain values that are none; names are paths, `0/exp_avg`."""
    leaves = dict(_leaves(optimizer.state_dict()["state"]))
    return ({name: v.detach().cpu().contiguous().clone() for name, v in leaves.items() if isinstance(v, Tensor)},
            {name: v for name, v in leaves.items() if not isinstance(v, Tensor)})


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict) -> None:
    """Put back what `state_tensors` gave; learning rates stay those of `optimizer`."""
    state: dict = {}
    for name, value in {**tensors, **plain}.items():
        index, *path, last = name.split("/")
        node = state.setdefault(int(index), {})
        for word in path:
            node = node.setdefault(word, {})
        node[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _leaves(tree: dict, path: str = ""):
    """bitsandbytes nests its state by one more level than torch."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value
