import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from finetune.diffusion import noise
from finetune.diffusion.path import Edm
from finetune.diffusion.timesteps import LAWS, draw, law, quantiles

N = 200_000
NUMBERS = {"logit_normal": {"mean": 0.0, "scale": 1.0}, "mode": {"scale": 1.29}, "sigmoid": {"scale": 1.0},
           "log_normal": {"mean": -1.2, "scale": 1.2}}


def fractions(kind: str, u: torch.Tensor, **numbers: float) -> torch.Tensor:
    return law(kind, 0.0, 1.0, **numbers)(u)


def assert_density(found: np.ndarray, density, low: float = 0.0, high: float = 1.0) -> None:
    """A histogram of what even quantiles give, against the integral of the density over each bin."""
    counts, edges = np.histogram(found, 50, (low, high))
    fine = np.linspace(low, high, 50 * 200 + 1)
    middle = (fine[1:] + fine[:-1]) / 2
    expected = density(middle).reshape(50, 200).mean(1) * (high - low) / 50
    np.testing.assert_allclose(counts / len(found), expected, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("mean, scale", [(0.0, 1.0), (1.0, 0.6), (0.5, 0.6)])
def test_logit_normal_has_the_density_of_the_paper(mean, scale):
    """Esser et al. 2024, eq. 19."""
    def density(t):
        return np.exp(-(np.log(t / (1 - t)) - mean) ** 2 / (2 * scale ** 2)) / (scale * math.sqrt(2 * math.pi) * t * (1 - t))

    assert_density(fractions("logit_normal", quantiles(N), mean=mean, scale=scale).numpy(), density)


def test_sigmoid_is_that_of_kohya():
    normal = torch.special.ndtri(quantiles(N))
    torch.testing.assert_close(fractions("sigmoid", quantiles(N), scale=0.7), torch.sigmoid(0.7 * normal))


def test_log_normal_is_that_of_karras():
    """ln σ ~ N(P_mean, P_std²)."""
    log_sigma = Edm().time(fractions("log_normal", quantiles(N), **NUMBERS["log_normal"]), quantiles(N)).log().numpy()
    assert_density(log_sigma, lambda x: np.exp(-(x + 1.2) ** 2 / 2.88) / (1.2 * math.sqrt(2 * math.pi)), -5, 2.5)


@pytest.mark.parametrize("scale", [1.29, 1.75, -1.0])
def test_mode_has_the_density_of_the_paper(scale):
    """π_mode(t) = |d/dt f⁻¹(t)| (Esser et al. 2024, eq. 20): a bin holds what f⁻¹, found by bisection, grows by over it."""
    def f(u):
        return 1 - u - scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)

    counts, edges = np.histogram(fractions("mode", quantiles(N), scale=scale).numpy(), 50, (0, 1))
    low, high = np.zeros(51), np.ones(51)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = np.where(f(middle) > edges, middle, low), np.where(f(middle) > edges, high, middle)
    np.testing.assert_allclose(counts / N, -np.diff(low), atol=2e-5)


def test_cosmap_has_the_density_of_the_paper():
    """Esser et al. 2024, eq. 22."""
    found = fractions("cosmap", quantiles(N)).numpy()
    assert_density(found, lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t ** 2))


def test_the_laws_are_those_of_diffusers():
    torch.manual_seed(0)
    theirs = compute_density_for_timestep_sampling("mode", N, mode_scale=1.29)
    torch.manual_seed(0)
    torch.testing.assert_close(fractions("mode", torch.rand(N).double(), scale=1.29).float(), theirs, rtol=1e-4, atol=1e-5)
    theirs = compute_density_for_timestep_sampling("logit_normal", N, 0.5, 0.6)
    ours = fractions("logit_normal", noise.uniforms(0, list(range(20_000)), "timestep"), mean=0.5, scale=0.6)
    levels = torch.linspace(0.01, 0.99, 50)
    assert (ours.float().quantile(levels) - theirs.quantile(levels)).abs().max() < 0.02


@pytest.mark.parametrize("kind", LAWS)
def test_a_law_keeps_to_its_range_up_to_both_ends_of_the_unit_interval(kind):
    u = torch.cat([quantiles(1000), torch.tensor([0.0, 2.0 ** -53, 1 - 2.0 ** -53, 1.0], dtype=torch.float64)])
    whole = fractions(kind, u, **NUMBERS.get(kind, {}))
    assert whole.dtype == torch.float64 and whole.isfinite().all() and 0 <= whole.min() and whole.max() <= 1
    part = law(kind, 0.25, 0.5, **NUMBERS.get(kind, {}))(u)
    torch.testing.assert_close(part, 0.25 + 0.25 * whole)


def test_a_uniform_law_changes_no_bit():
    u = noise.uniforms(0, list(range(1000)), "timestep")
    assert torch.equal(fractions("uniform", u), u) and torch.equal(draw(0, list(range(1000)), 1), u)


@pytest.mark.parametrize("first", [0, 24, 2 ** 62])
def test_every_step_draws_once_from_every_stratum(first):
    n, steps = 8, 2000
    u = draw(3, list(range(first, first + n * steps)), n).view(steps, n)
    strata = (u * n).long()
    assert torch.equal(strata.sort(1).values, torch.arange(n).expand(steps, n))
    assert (u.std(1) < 0.42).all() and u.mean(1).std() < 0.03       # 0.1 without strata
    # a step that is not full has no lean, and no slot a noise level of its own
    assert (u.mean(0) - 0.5).abs().max() < 0.04
    counts = torch.histc((u * n % 1).float(), 20, 0, 1)
    assert ((counts - n * steps / 20) ** 2 / (n * steps / 20)).sum() < 45       # chi-square with 19 degrees


def test_strata_are_a_function_of_position():
    whole = draw(3, list(range(16)), 8)
    assert torch.equal(torch.cat([draw(3, [p], 8) for p in range(16)]), whole)


def test_quantiles_are_even():
    assert quantiles(4).tolist() == [0.125, 0.375, 0.625, 0.875]
