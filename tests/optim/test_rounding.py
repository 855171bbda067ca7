"""Weights in bfloat16: steps too small for it count on average."""

import torch
from torch import nn

from finetune.optim.optimizer import OPTIMIZERS, load_state, state_tensors
from finetune.optim.rounding import by_chance, rounded


def made(p, name="adamw"):
    return rounded(lambda groups: OPTIMIZERS[name](groups, betas=(0.9, 0.999), weight_decay=0.0),
                   [{"params": [p], "lr": 1e-4}], lambda step: 1000 * step)


def steps(p, optimizer, numbers) -> None:
    for step in numbers:
        optimizer.param_groups[0]["now"] = step
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert p.grad is None and p.dtype == torch.bfloat16


def test_what_bfloat16_holds_stays_and_what_it_does_not_is_right_on_average():
    draw = torch.Generator().manual_seed(0)
    for value in (1.0, -1.5, 0.0):
        assert (by_chance(torch.full((100,), value), draw) == value).all()
    between = by_chance(torch.full((100_000,), -1.0 - 2 ** -9), draw).float()
    assert {*between.tolist()} == {-1.0, -1.0 - 2 ** -7}
    assert abs(between.mean().item() + 1 + 2 ** -9) < 2e-4


def test_small_steps_count():
    p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    steps(p, made(p), range(10))
    assert abs(p.float().mean().item() - (1 - 10e-4)) < 2e-4       # rounded to the nearest, it would be 1


def test_it_goes_on_bit_for_bit():
    for name in ("adamw", "adamw8bit", "adafactor"):
        whole, cut = (nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2))
        steps(whole, made(whole, name), range(6))
        first = made(cut, name)
        steps(cut, first, range(3))
        second = made(cut, name)
        load_state(second, *state_tensors(first))
        steps(cut, second, range(3, 6))
        assert torch.equal(whole, cut)


def test_float32_is_left_to_the_optimizer():
    p = nn.Parameter(torch.ones(3))
    assert made(p).param_groups[0]["params"][0] is p
