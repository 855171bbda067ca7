"""Weights that are trained in bfloat16: each step is made in float32 and rounded up or down at random.

bfloat16 keeps 8 bits, so most steps are smaller than what it can tell apart, and would be lost every time. Rounded with a
chance as large as what is cut off, they are right on average (Gupta et al. 2015, section 3)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.errors import FinetuneError


def rounded(make: Callable[[list[dict]], Optimizer], groups: list[dict], seed: Callable[[int], int]) -> Optimizer:
    """The optimizer of these groups. In place of each bfloat16 parameter it holds a float32 one that exists during the step
    alone. `seed(now)` gives the chances of a step, with `now` its number as the first group has it."""
    pairs: dict[nn.Parameter, tuple[int, nn.Parameter]] = {}

    def stand_in(p: nn.Parameter) -> nn.Parameter:
        if p.dtype != torch.bfloat16:
            return p
        wide = nn.Parameter(torch.empty(0, device=p.device))
        wide.stands_for, pairs[wide] = p, (len(pairs), p)
        return wide

    def held() -> list[tuple[nn.Parameter, int, nn.Parameter]]:
        return [(wide, *pairs[wide]) for group in optimizer.param_groups for wide in group["params"] if wide in pairs]

    optimizer = make([group | {"params": [stand_in(p) for p in group["params"]]} for group in groups])
    if pairs and hasattr(optimizer, "eval"):
        raise FinetuneError("train.optimizer: schedule_free_adamw averages in the weights themselves, which needs "
                            "base.dtype: float32")

    def widen(*_) -> None:
        for wide, _, p in held():
            if p.grad is not None:
                wide.data, wide.grad, p.grad = p.detach().float(), p.grad.float(), None

    def narrow(*_) -> None:
        for wide, number, p in held():
            if wide.grad is None:
                continue
            draw = torch.Generator(p.device).manual_seed((seed(optimizer.param_groups[0]["now"]) + number) % 2**63)
            p.data.copy_(by_chance(wide.detach(), draw))
            wide.data, wide.grad = torch.empty(0, device=p.device), None

    if pairs:
        optimizer.register_step_pre_hook(widen)
        optimizer.register_step_post_hook(narrow)
    return optimizer


def trained(held: nn.Parameter) -> nn.Parameter:
    """The parameter that is trained, of one that such an optimizer holds."""
    return getattr(held, "stands_for", held)


def by_chance(x: Tensor, draw: torch.Generator) -> Tensor:
    """float32 → bfloat16, which is its upper half: a random number is added to the lower one, which is cut off."""
    chance = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, generator=draw, device=x.device)
    return ((x.view(torch.int32) + chance) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
