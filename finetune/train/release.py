"""Gradient release: each parameter is stepped within the backward pass, and lets go of its gradient (LOMO, Lv et al. 2023)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.optim.rounding import trained


@contextmanager
def released(optimizer: Optimizer, step: Callable[[Tensor], None]) -> Iterator[list[Tensor]]:
    """Inside a backward, no two parameters have a gradient at once: as soon as one has, `step` is called with its norm, and
    the optimizer knows of no other, for to look at all of them each time would take longer than the arithmetic. Gives the
    list of the norms."""
    norms: list[Tensor] = []
    groups = optimizer.param_groups
    whole = [group["params"] for group in groups]

    def hook(group: dict, held: nn.Parameter) -> Callable[[nn.Parameter], None]:
        def let_go(p: nn.Parameter) -> None:
            norms.append(p.grad.norm())
            group["params"] = [held]
            step(norms[-1])
            group["params"], p.grad = [], None

        return let_go

    hooks = [trained(held).register_post_accumulate_grad_hook(hook(group, held))
             for group in groups for held in group["params"]]
    for group in groups:
        group["params"] = []
    try:
        yield norms
    finally:
        for each in hooks:
            each.remove()
        for group, params in zip(groups, whole):
            group["params"] = params
