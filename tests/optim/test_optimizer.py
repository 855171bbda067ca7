import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import FinetuneError
from finetune.optim.optimizer import OPTIMIZERS, load_state, state_tensors

SHAPES = [(3, 5), (1,), (257,), (64, 64), (7, 3, 3, 3), (300, 17)]      # below, above and across bitsandbytes' blocks
OPTIONS = dict(betas=(0.9, 0.99), weight_decay=0.1)


def made(name: str, **changes):
    """Parameters in two groups, and their optimizer as `train/setup.py` makes it."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = [{"params": parameters[:2], "lr": 1e-2, "peak_lr": 1e-2}, {"params": parameters[2:], "lr": 1e-3, "peak_lr": 1e-3}]
    return parameters, OPTIMIZERS[name](groups, **OPTIONS | changes)


def steps(parameters, optimizer, numbers) -> None:
    for number in numbers:
        torch.manual_seed(100 + number)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(optimizer, path) -> tuple[dict, dict]:
    tensors, plain = state_tensors(optimizer)
    save_file(tensors, path)
    return load_file(path), json.loads(json.dumps(plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_optimizer_goes_on_bit_for_bit(name, done, tmp_path):
    whole, optimizer = made(name)
    steps(whole, optimizer, range(6))

    cut, optimizer = made(name)
    steps(cut, optimizer, range(done))
    tensors, plain = through_a_file(optimizer, tmp_path / "state")
    again, optimizer = made(name)
    with torch.no_grad():
        for p, value in zip(again, cut):
            p.copy_(value)
    load_state(optimizer, tensors, plain)
    steps(again, optimizer, range(done, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_loaded_is_what_is_saved(name, tmp_path):
    parameters, optimizer = made(name)
    steps(parameters, optimizer, range(2))
    tensors, plain = through_a_file(optimizer, tmp_path / "state")
    other = made(name)[1]
    load_state(other, tensors, plain)
    again, plain_again = state_tensors(other)
    assert plain_again == plain and again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor)
    assert [group["lr"] for group in other.param_groups] == [1e-2, 1e-3]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_does_not_follow_the_run(name):
    parameters, optimizer = made(name)
    steps(parameters, optimizer, range(2))
    tensors, _ = state_tensors(optimizer)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    steps(parameters, optimizer, range(2, 4))
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_state_can_be_saved_and_loaded(name, tmp_path):
    tensors, plain = through_a_file(made(name)[1], tmp_path / "state")
    assert not tensors and not plain
    load_state(made(name)[1], tensors, plain)


def test_every_parameter_has_eight_bit_moments_from_the_first_step():
    parameters, optimizer = made("adamw8bit")
    steps(parameters, optimizer, range(1))
    for p in parameters:
        for moment in ("state1", "state2"):
            assert optimizer.state[p][moment].dtype == torch.uint8 and optimizer.state[p][moment].numel() == p.numel()


def test_eight_bits_descend_almost_as_thirty_two_do():
    """Different, or it would not be 8 bits; near, or it would not be AdamW."""
    start, ends = made("adamw")[0], {}
    for name in ("adamw", "adamw8bit"):
        parameters, optimizer = made(name)
        steps(parameters, optimizer, range(4))
        ends[name] = torch.cat([(p - q).detach().flatten() for p, q in zip(parameters, start)])
    difference = (ends["adamw"] - ends["adamw8bit"]).norm() / ends["adamw"].norm()
    assert 0 < difference < 0.2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_is_the_formula(name):
    """p·(1 − lr·decay) − lr·g/(|g| + eps): after one step both moments are the gradient's."""
    parameters, optimizer = made(name)
    before = [p.detach().clone() for p in parameters]
    torch.manual_seed(100)
    signs = [torch.randn_like(p).sign() for p in parameters]
    steps(parameters, optimizer, range(1))
    for i, p in enumerate(parameters):
        lr = 1e-2 if i < 2 else 1e-3
        torch.testing.assert_close(p.detach(), before[i] * (1 - lr * 0.1) - lr * signs[i], rtol=1e-5, atol=lr * 1e-3)


def test_bitsandbytes_that_is_not_there_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(FinetuneError, match=r"finetune\[8bit\]"):
        made("adamw8bit")
