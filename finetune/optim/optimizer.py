"""Optimizers by name, and their state as plain tensors.

Each is made from parameter groups with their learning rates, betas (None where it has none) and weight decay."""

import importlib
from contextlib import redirect_stdout
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetune.errors import FinetuneError

Betas = tuple[float, float]
RECIPE = ("params", "lr", "peak_lr", "until", "now")       # of a group: what the run gives at every start, and no checkpoint


def adamw(groups: list[dict], betas: Betas, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), one fused kernel for all parameters."""
    return torch.optim.AdamW(groups, fused=True, betas=betas, weight_decay=weight_decay)


def of_bitsandbytes(groups: list[dict], betas: Betas, weight_decay: float, name: str) -> Optimizer:
    """AdamW with blockwise 8-bit state (Dettmers et al. 2022), or Lion (Chen et al. 2023, algorithm 2), the sign of the
    momentum, so that every element moves by the whole learning rate; with 8-bit momentum too. `min_8bit_size=1`: by default
    bitsandbytes keeps 32 bits for parameters below 4 096 elements, which most LoRA matrices are, and says nothing."""
    make = getattr(_extra(name.lower(), "bitsandbytes.optim", "8bit"), name)
    return make(groups, betas=betas, weight_decay=weight_decay, **({"min_8bit_size": 1} if name.endswith("8bit") else {}))


def adafactor(groups: list[dict], betas: None, weight_decay: float) -> Optimizer:
    """Adafactor (Shazeer & Stern 2018): a second moment of one row and one column, and no first.

    The paper's step is lr·max(ε₂, RMS(p)) with ε₂ = 10⁻³ (algorithm 4): a LoRA's B, zero at the start, would move a thousand
    times slower than A. With ε₂ = 1 a step is the learning rate itself (1/√step at most), until RMS(p) is above 1."""
    return torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=weight_decay)


def prodigy(groups: list[dict], betas: Betas, weight_decay: float) -> Optimizer:
    """Prodigy (Mishchenko & Defazio 2024) finds the rate by itself; the options are those that its README advises for
    diffusion models."""
    rates = {group["lr"] for group in groups}
    if len(rates) > 1:
        raise FinetuneError("train.optimizer: prodigy finds one rate for all, so the methods cannot differ in theirs")
    if not 0.1 <= min(rates) <= 10:
        raise FinetuneError(f"train.optimizer: prodigy finds the rate by itself and multiplies it by learning_rate, so "
                            f"{min(rates):g} is not what it seems: leave it out, or stay within 0.1 … 10")
    Prodigy = _extra("prodigy", "prodigyopt", "prodigy").Prodigy
    with redirect_stdout(None):     # it prints that weight decay is decoupled
        return Prodigy(groups, betas=betas, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True)


def schedule_free_adamw(groups: list[dict], betas: Betas, weight_decay: float) -> Optimizer:
    """Schedule-Free AdamW (Defazio et al. 2024): gradients are taken at y, and what counts is x, an average of the way.

    After `eval()` the parameters hold x, after `train()` y; a step wants y."""
    AdamWScheduleFree = _extra("schedule_free_adamw", "schedulefree", "schedulefree").AdamWScheduleFree
    return AdamWScheduleFree(groups, betas=betas, weight_decay=weight_decay)


def sgd(groups: list[dict], betas: None, weight_decay: float) -> Optimizer:
    """Stochastic gradient descent with the usual momentum of 0.9; its weight decay is a part of the gradient."""
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)


OPTIMIZERS = {"adamw": adamw,
              **{name.lower(): partial(of_bitsandbytes, name=name) for name in ("AdamW8bit", "Lion", "Lion8bit")},
              "adafactor": adafactor, "prodigy": prodigy, "schedule_free_adamw": schedule_free_adamw, "sgd": sgd}


def state_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict]:
    """The state as named tensors, and the plain values that are none; names are paths, `0/exp_avg`. What an optimizer keeps
    in its groups is in it too, `groups/0/k`: all that is no longer the default that it was made with."""
    whole = optimizer.state_dict()
    groups = {i: {key: value for key, value in group.items() if key not in RECIPE and value != optimizer.defaults.get(key)}
              for i, group in enumerate(whole["param_groups"])}
    leaves = dict(_leaves(whole["state"] | {"groups": groups}))
    return ({name: v.detach().cpu().contiguous().clone() for name, v in leaves.items() if isinstance(v, Tensor)},
            {name: v for name, v in leaves.items() if not isinstance(v, Tensor)})


def load_state(optimizer: Optimizer, tensors: dict[str, Tensor], plain: dict) -> None:
    """Put back what `state_tensors` gave, into an optimizer that is newly made; learning rates stay those of `optimizer`."""
    tree: dict = {}
    for name, value in {**tensors, **plain}.items():
        *path, last = name.split("/")
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[last] = value
    kept = tree.pop("groups", {})
    groups = enumerate(optimizer.state_dict()["param_groups"])
    optimizer.load_state_dict({"state": {int(index): state for index, state in tree.items()},
                               "param_groups": [group | kept.get(str(i), {}) for i, group in groups]})


def _extra(name: str, module: str, extra: str):
    """A module that comes with one of our extras."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise FinetuneError(f"train.optimizer: {name} needs {package}: pip install 'finetune[{extra}]'") from None


def _leaves(tree: dict, path: str = ""):
    """bitsandbytes nests its state by one more level than torch."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value
