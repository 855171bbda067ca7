import json
import sys

import pytest
import torch
from torch import nn

from finetune.artifact import read_tensors, write_safetensors
from finetune.errors import FinetuneError
from finetune.optim.optimizer import OPTIMIZERS, load_state, state_tensors
from finetune.recipe.train import BETAS, Train

SHAPES = [(3, 5), (1,), (257,), (64, 64), (7, 3, 3, 3), (300, 17)]      # below, above and across bitsandbytes' blocks


def rates(name: str) -> tuple[float, float]:
    """Of two groups."""
    return (1.0, 1.0) if name == "prodigy" else (1e-2, 1e-3)


def built(name: str, parameters, **changes):
    """An optimizer with two groups, as `train/setup.py` makes it."""
    groups = [{"params": some, "lr": rate, "peak_lr": rate}
              for some, rate in zip((parameters[:2], parameters[2:]), rates(name))]
    betas = (0.9, 0.99) if name in BETAS else None
    return OPTIMIZERS[name](groups, **{"betas": betas, "weight_decay": 0.1} | changes)


def made(name: str, **changes):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return parameters, built(name, parameters, **changes)


def turn(optimizer, mode: str) -> None:
    """What accelerate's wrapper does with `train()` and `eval()`: nothing where the optimizer has no modes."""
    getattr(optimizer, mode, lambda: None)()


def steps(parameters, optimizer, numbers) -> None:
    """The order of `loop.one_step`."""
    for number in numbers:
        torch.manual_seed(100 + number)
        turn(optimizer, "train")
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        turn(optimizer, "eval")
        optimizer.zero_grad()


def through_a_file(optimizer, path) -> tuple[dict, dict]:
    """As `train/checkpoint.py` keeps it."""
    tensors, plain = state_tensors(optimizer)
    write_safetensors(path, tensors, {})
    return read_tensors(path), json.loads(json.dumps(plain, sort_keys=True))


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
    assert not any(torch.equal(p, q) for p, q in zip(cut, again, strict=True))


class LowRank(nn.Module):
    """A frozen layer with an adapter whose B is zero at the start."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(24, 20).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(4, 24) / 24 ** 0.5), nn.Parameter(torch.zeros(20, 4))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def fit(model, optimizer, numbers) -> None:
    """Steps of a regression, with learning rates that change on the way."""
    for number in numbers:
        turn(optimizer, "train")
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (1 - number / 8)
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(number))
        nn.functional.mse_loss(model(x), x[:, :20].sin()).backward()
        nn.utils.clip_grad_norm_([model.A, model.B], 1.0)
        optimizer.step()
        turn(optimizer, "eval")
        optimizer.zero_grad()


def adapter(name: str):
    model = LowRank()
    groups = [{"params": [p], "lr": rate, "peak_lr": rate} for p, rate in zip((model.A, model.B), rates(name))]
    return model, OPTIMIZERS[name](groups, betas=BETAS.get(name), weight_decay=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_adapter_that_is_resumed_is_the_same(name, tmp_path):
    whole, optimizer = adapter(name)
    fit(whole, optimizer, range(6))

    cut, optimizer = adapter(name)
    fit(cut, optimizer, range(3))
    tensors, plain = through_a_file(optimizer, tmp_path / "state")
    write_safetensors(tmp_path / "parameters", {"A": cut.A.detach(), "B": cut.B.detach()}, {})
    again, optimizer = adapter(name)
    again.load_state_dict(read_tensors(tmp_path / "parameters"), strict=False)
    load_state(optimizer, tensors, plain)
    fit(again, optimizer, range(3, 6))
    assert torch.equal(again.A, whole.A) and torch.equal(again.B, whole.B)
    assert whole.B.any() and not torch.equal(whole.A, LowRank().A)


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
    for group, before in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in before.items() if k != "params"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_are_those_of_the_run(name, tmp_path):
    parameters, optimizer = made(name)
    steps(parameters, optimizer, range(1))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    state = through_a_file(optimizer, tmp_path / "state")
    other = made(name)[1]
    load_state(other, *state)
    assert [(group["lr"], group["peak_lr"]) for group in other.param_groups] == [(rate, rate) for rate in rates(name)]


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


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "sgd"])
def test_only_what_keeps_values_in_its_groups_saves_them(name):
    """A checkpoint of the first release has none, and stays readable."""
    parameters, optimizer = made(name)
    steps(parameters, optimizer, range(2))
    assert not any(key.startswith("groups/") for key in state_tensors(optimizer)[1])


def test_values_in_groups_are_saved():
    parameters, optimizer = made("schedule_free_adamw")
    steps(parameters, optimizer, range(2))
    plain = state_tensors(optimizer)[1]
    assert plain["groups/0/k"] == 2
    assert plain["groups/1/lr_max"] == 1e-3 and plain["groups/1/weight_sum"] == pytest.approx(2e-6)
    assert not any("params" in key or key.endswith("/lr") for key in plain)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "prodigy"])
def test_groups_learn_at_their_own_rates(name):
    """Steps of the first group are ten times those of the second."""
    parameters, optimizer = made(name, weight_decay=0.0)
    with torch.no_grad():
        for p in parameters:
            p.fill_(0.5)
    before = [p.detach().clone() for p in parameters]
    steps(parameters, optimizer, range(1))
    moved = [(p - q).detach().pow(2).mean().sqrt() for p, q in zip(parameters, before)]
    assert moved[0] / moved[3] == pytest.approx(10, rel=0.4)


@pytest.mark.parametrize("name, moments", [("adamw8bit", ("state1", "state2")), ("lion8bit", ("state1",))])
def test_every_parameter_has_eight_bit_moments_from_the_first_step(name, moments):
    parameters, optimizer = made(name)
    steps(parameters, optimizer, range(1))
    for p in parameters:
        assert all(key not in optimizer.state[p] for key in {"state1", "state2"} - set(moments))
        for moment in moments:
            assert optimizer.state[p][moment].dtype == torch.uint8 and optimizer.state[p][moment].numel() == p.numel()


@pytest.mark.parametrize("name, limit", [("adamw", 0.2), ("lion", 0.7)])
def test_eight_bits_descend_almost_as_thirty_two_do(name, limit):
    """Different, or it would not be 8 bits; near, or it would not be the same. Lion takes signs, so what differs, differs
    by two whole steps: in less than an eighth of the elements and steps."""
    start, ends = made(name)[0], {}
    for bits in ("", "8bit"):
        parameters, optimizer = made(name + bits)
        steps(parameters, optimizer, range(4))
        ends[bits] = torch.cat([(p - q).detach().flatten() for p, q in zip(parameters, start)])
    difference = (ends[""] - ends["8bit"]).norm() / ends[""].norm()
    assert 0 < difference < limit


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "lion8bit", "schedule_free_adamw", "sgd", "prodigy"])
def test_the_first_step_is_the_formula(name):
    """p·(1 − lr·decay) − lr·g/(|g| + eps): after one step both of Adam's moments are the gradient's, Lion takes the sign of
    its first momentum, and the average of one step is that step. Of SGD the momentum is the gradient. Of Prodigy lr is its
    first guess, 10⁻⁶."""
    parameters, optimizer = made(name)
    before = [p.detach().clone() for p in parameters]
    torch.manual_seed(100)
    gradients = [torch.randn_like(p) for p in parameters]
    steps(parameters, optimizer, range(1))
    for i, (p, g) in enumerate(zip(parameters, gradients)):
        lr = 1e-6 if name == "prodigy" else rates(name)[0 if i < 2 else 1]
        expected = before[i] * (1 - lr * 0.1) - lr * (g if name == "sgd" else g.sign())
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=lr * 1e-3 + (2e-7 if name == "prodigy" else 0))


def test_sgd_has_momentum():
    parameters, optimizer = made("sgd", weight_decay=0.0)
    before = parameters[0].detach().clone()
    for _ in range(2):
        parameters[0].grad = torch.ones_like(before)
        optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), before - 1e-2 * (1 + 1.9))


def test_adafactor_moves_a_matrix_of_zeros_as_fast_as_another():
    """Its step is the learning rate, and no share of what is there."""
    model, optimizer = adapter("adafactor")
    fit(model, optimizer, range(1))
    state = optimizer.state[model.B]
    assert model.B.detach().pow(2).mean().sqrt() == pytest.approx(rates("adafactor")[1], rel=0.05)
    assert state["row_var"].shape == (20, 1) and state["col_var"].shape == (1, 4)


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_prodigy_finds_a_rate_and_keeps_it(lr, tmp_path):
    """From 10⁻⁶ to the bottom of a bowl that is 3 away; resumed in the middle of the search."""
    def bowl():
        p = nn.Parameter(torch.full((10,), 3.0))
        return p, OPTIMIZERS["prodigy"]([{"params": [p], "lr": lr, "peak_lr": lr}], betas=(0.9, 0.999), weight_decay=0.0)

    def roll(p, optimizer, times):
        for _ in range(times):
            p.grad = p.detach().clone()
            optimizer.step()

    whole, optimizer = bowl()
    roll(whole, optimizer, 400)
    found = optimizer.param_groups[0]["d"]
    assert whole.abs().max() < 0.3 and 1e-2 < found < 10

    cut, optimizer = bowl()
    roll(cut, optimizer, 65)
    assert 1e-6 < optimizer.param_groups[0]["d"] < found
    state = through_a_file(optimizer, tmp_path / "state")
    again, optimizer = bowl()
    again.data.copy_(cut.data)
    load_state(optimizer, *state)
    roll(again, optimizer, 400 - 65)
    assert torch.equal(again, whole) and optimizer.param_groups[0]["d"] == found


@pytest.mark.parametrize("learning_rates, said", [
    ((1.0, 0.5), "one rate for all"), ((1e-4, 1e-4), "0.0001 is not what it seems")])
def test_prodigy_with_a_rate_that_it_cannot_have(learning_rates, said):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in learning_rates]
    with pytest.raises(FinetuneError, match=said):
        OPTIMIZERS["prodigy"](groups, betas=(0.9, 0.999), weight_decay=0.0)


def test_prodigy_prints_nothing(capsys):
    made("prodigy")
    assert capsys.readouterr().out == ""


def test_schedule_free_shows_the_average_between_steps():
    """x is the mean of all z (constant rate), whether the modes are switched at every step or once at the end."""
    parameters, optimizer = made("schedule_free_adamw", weight_decay=0.0)
    z = []
    for number in range(12):
        steps(parameters, optimizer, [number])
        z.append([optimizer.state[p]["z"].clone() for p in parameters])
    for i, p in enumerate(parameters):
        torch.testing.assert_close(p.detach(), torch.stack([at[i] for at in z]).mean(0), rtol=1e-5, atol=1e-5)

    others, optimizer = made("schedule_free_adamw", weight_decay=0.0)
    optimizer.train()
    for number in range(12):
        torch.manual_seed(100 + number)
        for p in others:
            p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.eval()
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerates_wrapper_and_a_skipped_float16_step(name):
    """The way of mixed_precision: fp16, with a scaler on the CPU: a step of infinite gradients changes nothing, the next
    steps are those of the unscaled gradients."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    plain, optimizer = made(name)
    steps(plain, optimizer, range(3))

    parameters, inner = made(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    before = [p.detach().clone() for p in parameters]
    for number in (None, 0, 1, 2):
        optimizer.train()
        torch.manual_seed(100 + (number or 0))
        scaler.scale(torch.ones(()))            # as backward does
        for p in parameters:
            p.grad = torch.randn_like(p) * scaler.get_scale() if number is not None else torch.full_like(p, torch.inf)
        scaler.unscale_(inner)                  # as clip_grad_norm_ does
        optimizer.step()
        optimizer.eval()
        optimizer.zero_grad()
        if number is None:
            assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(parameters, plain, strict=True))


@pytest.mark.parametrize("name, module, extra", [
    ("adamw8bit", "bitsandbytes.optim", "8bit"), ("lion", "bitsandbytes.optim", "8bit"),
    ("lion8bit", "bitsandbytes.optim", "8bit"), ("prodigy", "prodigyopt", "prodigy"),
    ("schedule_free_adamw", "schedulefree", "schedulefree")])
def test_a_package_that_is_not_there_is_told(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(FinetuneError, match=rf"^train.optimizer: {name} needs {package}: .*finetune\[{extra}\]"):
        made(name)


def test_the_recipe_knows_the_same_names():
    from typing import get_args

    assert get_args(Train.model_fields["optimizer"].annotation) == tuple(OPTIMIZERS)
    assert BETAS.keys() < OPTIMIZERS.keys()
