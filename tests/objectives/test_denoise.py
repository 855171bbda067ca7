"""The loss of a batch on a network that is a formula: noise, masks, batches. The numbers: test_formulas.py."""

from types import SimpleNamespace

import pytest
import torch

from finetune.batch import Batch, Conditioning
from finetune.diffusion import noise
from finetune.diffusion.epsilon import Epsilon
from finetune.diffusion.losses import loss
from finetune.diffusion.path import RectifiedFlow, ddpm
from finetune.diffusion.timesteps import law, quantiles
from finetune.objectives.denoise import Denoise, build
from finetune.recipe.objective import Objective

BASE = ddpm("scaled_linear", 0.00085, 0.012, 1000, "epsilon")
V = ddpm("cosine", 0, 0, 1000, "v_prediction", True)


def batch(positions: list[int], mask: torch.Tensor | None = None, weight: list[float] | None = None) -> Batch:
    n = len(positions)
    latents = torch.stack([torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(p)) for p in positions])
    return Batch(positions, [""] * n, torch.tensor(weight or [1.0] * n), 1 / n, torch.tensor([[48, 48, 0, 0, 48, 48]] * n),
                 latents=latents, mask=mask, conditioning=Conditioning(torch.zeros(n, 1, 1)))


def family(answer=lambda x, t: 0.5 * x):
    """A base whose network is a function of x_t and what it is told, and what it was called with."""
    seen = {}

    def denoise(x, t, conditioning, geometry):
        seen.update(x=x, t=t)
        return answer(x, t)

    return SimpleNamespace(stride=8, path=BASE, denoise=denoise, seen=seen)


def test_perturbation_is_in_the_picture_and_not_in_the_target():
    """A network that returns what it sees as noise, x_t = eps + 0.1 · extra at zero SNR, is off by the extra alone."""
    base = family(lambda x, t: x)
    noisy = Denoise(RectifiedFlow(), law("uniform", 1 - 1e-9, 1.0), epsilon=Epsilon(perturbation=0.1))
    losses = noisy(base, batch([0, 1]), 0)
    extra = noise.normal((4, 6, 6), 0, [0, 1], "perturbation")
    x0 = batch([0, 1]).latents
    torch.testing.assert_close(losses.per_example, (0.1 * extra + x0).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_offset_is_in_both():
    base = family(lambda x, t: x)
    moved = Denoise(V, law("uniform", 0.9999, 1.0), epsilon=Epsilon(offset=0.3))
    losses = moved(base, batch([0, 1]), 0)
    x0 = batch([0, 1]).latents
    torch.testing.assert_close(base.seen["x"], Epsilon(offset=0.3).draw((4, 6, 6), 0, [0, 1]))
    torch.testing.assert_close(losses.per_example, (base.seen["x"] + x0).square().mean((1, 2, 3)))      # v = −x0 there


@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
def test_every_loss_is_a_mean_over_the_mask(kind):
    half = torch.zeros(2, 1, 6, 6)
    half[..., :3] = 1
    inside, numbers = loss(kind, **({"c": 0.1, "schedule": "snr"} if kind == "huber" else {})), quantiles(2)
    whole, masked = (Denoise(RectifiedFlow(), lambda u: numbers, loss=inside)(family(), batch([0, 1], mask), 0).per_example
                     for mask in (None, half))
    other = Denoise(RectifiedFlow(), lambda u: numbers, loss=inside)(family(), batch([0, 1], 1 - half), 0).per_example
    torch.testing.assert_close((masked + other) / 2, whole)
    assert not torch.allclose(masked, other)


def test_a_batch_costs_what_its_examples_cost():
    objective = build(**fields(timesteps={"kind": "logit_normal", "stratified": True}, path={"kind": "edm"}, loss="huber",
                               noise={"offset": 0.1, "pyramid": 0.3, "perturbation": 0.1}), step_size=4)
    whole = objective(family(), batch(list(range(4))), 0)
    alone = [objective(family(), batch([p]), 0) for p in range(4)]
    torch.testing.assert_close(whole.per_example, torch.cat([losses.per_example for losses in alone]))
    torch.testing.assert_close(whole.loss, torch.stack([losses.loss for losses in alone]).mean())


def fields(**words) -> dict:
    """What `setup` hands to `build`."""
    return Objective.model_validate(words).model_dump(exclude={"kind"}, exclude_none=True)


def test_the_words_of_a_recipe_are_an_objective():
    assert build(**fields(), step_size=8).strata == 1
    objective = build(**fields(
        path={"kind": "ddpm", "schedule": "cosine", "prediction": "v_prediction", "zero_snr": True},
        timesteps={"kind": "mode", "min": 0.1, "max": 0.9, "stratified": True}, weighting={"kind": "p2", "k": 2.0},
        noise={"offset": 0.05, "offset_random": True}, loss={"kind": "huber", "schedule": "snr"}), step_size=8)
    assert objective.path.alphas_cumprod[-1] == 0 and objective.strata == 8
    assert objective.epsilon == Epsilon(offset=0.05, offset_random=True)
    assert objective.weight.keywords == {"gamma": 1.0, "k": 2.0} and objective.loss.keywords == {"c": 0.1, "schedule": "snr"}
    t = objective.law(quantiles(100))
    assert 0.1 <= t.min() and t.max() <= 0.9
