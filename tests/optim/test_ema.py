import pytest
import torch

from finetune.optim.ema import Ema


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return {"a": torch.nn.Parameter(torch.randn(3, 2).to(dtype)), "b": torch.nn.Parameter(torch.randn(5).to(dtype))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_the_formula(decay, dtype):
    trained = parameters(dtype)
    ema = Ema(trained, decay)
    expected = {name: p.detach().double() for name, p in trained.items()}
    for step in range(30):
        with torch.no_grad():
            for p in trained.values():
                p.add_(torch.randn_like(p))
        ema.update(step)
        d = min(decay, (1 + step) / (10 + step))
        expected = {name: d * expected[name] + (1 - d) * p.detach().double() for name, p in trained.items()}
    for name, average in ema.average.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_the_start_is_forgotten():
    trained = parameters()
    ema = Ema(trained, 0.9999)
    with torch.no_grad():
        for p in trained.values():
            p.fill_(1.0)
    for step in range(200):
        ema.update(step)
    assert all((average - 1).abs().max() < 1e-3 for average in ema.average.values())


def test_swapped_shows_the_average_and_gives_every_bit_back():
    trained = parameters()
    ema = Ema(trained, 0.5)
    with torch.no_grad():
        trained["a"].mul_(1e-7).add_(1e7)
    ema.update(0)
    places, before = dict(trained), {name: p.detach().clone() for name, p in trained.items()}
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        assert all(torch.equal(p, ema.average[name]) for name, p in trained.items())
        assert not torch.equal(trained["a"], before["a"])
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) and p is places[name] and p.requires_grad for name, p in trained.items())


def test_the_average_is_a_copy():
    trained = parameters()
    ema = Ema(trained, 0.5)
    with torch.no_grad():
        trained["a"].zero_()
    assert ema.average["a"].any() and not ema.average["a"].requires_grad
