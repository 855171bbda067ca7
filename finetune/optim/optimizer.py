"""Optimizers by name, and their state as plain tensors."""

import json

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


def state_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], str]:
    """The state as named tensors, and what is no tensor as JSON."""
    tensors, plain = {}, {}
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{key}"] = value.detach().cpu().contiguous().clone()
            else:
                plain[f"{i}.{key}"] = value
    return tensors, json.dumps(plain, sort_keys=True)


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: str) -> None:
    """Put back what `state_tensors` gave; learning rates stay those of `optimizer`."""
    state: dict[int, dict] = {}
    for name, value in {**tensors, **json.loads(plain)}.items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
