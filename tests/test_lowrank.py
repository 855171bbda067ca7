import math

import pytest
import torch

from finetune import lowrank
from finetune.change import core
from finetune.errors import FinetuneError
from finetune.lowrank import Cut, LowRank


def lora(out: int, inner: tuple, rank: int, alpha: float, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {"lora_A": torch.randn(rank, *inner, generator=g), "alpha": torch.tensor(alpha),
            "lora_B": torch.randn(out, rank, *[1] * (len(inner) - 1), generator=g)}


def matrix(product: LowRank) -> torch.Tensor:
    return (product.up_OR.double() @ product.down_RI.double()).reshape(-1, *product.inner)


MODULES = [lora(12, (9,), 3, 2.0, 0), lora(12, (9,), 5, 1.0, 1)]
CONVS = [lora(6, (4, 3, 3), 3, 2.0, 0), lora(6, (4, 3, 3), 8, 1.0, 1)]


@pytest.mark.parametrize("modules", [MODULES, CONVS], ids=["linear", "conv"])
def test_the_sum_is_exact_and_its_norm_needs_no_product(modules):
    product = lowrank.total([(modules[0], 0.8), (modules[1], -0.5)])
    wanted = 0.8 * core(modules[0]).double() - 0.5 * core(modules[1]).double()
    assert product.rank == sum(len(module["lora_A"]) for module in modules) and product.rest == 0
    torch.testing.assert_close(matrix(product), wanted, rtol=0, atol=1e-5)
    assert product.norm == pytest.approx(wanted.norm().item(), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("modules", [MODULES, CONVS], ids=["linear", "conv"])
def test_what_is_cut_is_the_least_possible_and_said(modules, rank):
    whole = lowrank.total([(module, 1.0) for module in modules])
    s = torch.linalg.svdvals(matrix(whole).flatten(1))
    small, dense = lowrank.shrunk(whole, Cut(rank)), lowrank.nearest(matrix(whole), Cut(rank))
    for product in (small, dense):
        kept = min(rank, len(s))
        assert product.rank == kept
        measured = (matrix(whole) - matrix(product)).norm().item()
        assert measured == pytest.approx(s[kept:].norm().item(), rel=1e-5, abs=1e-5 * s[0].item())      # Eckart & Young
        assert product.rest == pytest.approx(measured, rel=1e-5, abs=1e-5 * s[0].item())


def test_an_energy_takes_as_few_ranks_as_hold_it():
    change = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))      # squares 16, 4, 1, 0.25 of 21.25
    whole = lowrank.nearest(change, Cut(energy=1.0))
    for energy, rank in ((0.75, 1), (0.76, 2), (0.95, 3), (0.99, 4), (1.0, 4)):
        assert lowrank.nearest(change, Cut(energy=energy)).rank == lowrank.shrunk(whole, Cut(energy=energy)).rank == rank
    assert whole.rest < 1e-6


def test_a_large_matrix_is_cut_nearly_as_well_and_always_the_same():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 400, generator=g)      # the hardest: no singular value stands out
    before = torch.random.get_rng_state()
    product = lowrank.nearest(noise, Cut(16))
    assert torch.equal(before, torch.random.get_rng_state())
    best = torch.linalg.svdvals(noise)[16:].norm().item()
    assert best <= product.rest <= best * 1.001
    assert torch.equal(product.up_OR, lowrank.nearest(noise, Cut(16)).up_OR)
    low = torch.randn(300, 40, generator=g) @ torch.randn(40, 400, generator=g)     # more than the first 16 that are looked at
    found = lowrank.nearest(low, Cut(energy=0.9))
    s = torch.linalg.svdvals(low).square()
    assert found.rank == 1 + int((s.cumsum(0) < 0.9 * s.sum()).sum()) and found.rest / found.norm <= math.sqrt(0.1)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_the_error_is_that_of_what_is_written(dtype, most):
    whole = {"a": lowrank.total([(module, 1.0) for module in MODULES]), "b": lowrank.total([(CONVS[0], 1.0)])}
    for size in (None, 2):
        cut = {stem: lowrank.shrunk(product, Cut(size)) if size else product for stem, product in whole.items()}
        tensors, said = lowrank.packed(cut, dtype)
        assert tensors["a.alpha"] == tensors["b.alpha"] == max(product.rank for product in cut.values())
        rests = {}
        for stem, product in said.items():
            module = {role: tensors[f"{stem}.{role}"] for role in ("lora_A", "lora_B", "alpha")}
            up, down = lowrank.factors(module)
            rests[stem] = (matrix(whole[stem]).flatten(1) - up @ down).norm().item()
            assert product.error == pytest.approx(rests[stem] / product.norm, rel=1e-2, abs=2e-8)
            assert size or product.error < most
        overall = math.hypot(*rests.values()) / math.hypot(*(product.norm for product in said.values()))
        assert lowrank.error(said.values()) == pytest.approx(overall, rel=1e-2, abs=2e-8)


def test_what_cannot_be_written_is_refused():
    large = lowrank.total([(lora(4, (4,), 2, 1e6, 0), 1.0)])
    with pytest.raises(FinetuneError, match="x is not finite in float16; use --dtype float32"):
        lowrank.packed({"x": large}, torch.float16)
    with pytest.raises(FinetuneError, match="no layer has changed"):
        lowrank.packed({}, torch.float32)


def test_differences_are_those_of_what_was_trained():
    g = torch.Generator().manual_seed(0)
    before = {"a.weight": torch.randn(8, 6, generator=g), "b.weight": torch.randn(8, 6, generator=g), "a.bias": torch.zeros(8)}
    after = {"a.weight": before["a.weight"] + 0.5, "b.weight": before["b.weight"].half(), "a.bias": torch.full((8,), 0.25)}
    found, other = lowrank.differences(((name, t, after[name]) for name, t in before.items()), lambda stem: True, Cut(1))
    assert found.keys() == {"a"} and other == pytest.approx(0.5)        # b is a coarse copy
    torch.testing.assert_close(matrix(found["a"]).float(), torch.full((8, 6), 0.5), rtol=0, atol=1e-5)
    assert lowrank.error(found.values(), other) == pytest.approx((0.5 / (0.5 + 12)) ** 0.5, rel=1e-4)
    with pytest.raises(FinetuneError, match="a.bias: its change is not finite"):
        lowrank.differences([("a.bias", torch.zeros(2), torch.tensor([0, torch.nan]))], lambda stem: True, Cut(1))
