import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from finetune.diffusion.path import Edm, RectifiedFlow, conversion, ddpm, snr
from finetune.diffusion.timesteps import law, uniform
from finetune.diffusion.weights import WEIGHTINGS, weighting

BETAS = (0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * np.arange(1000) / 999) ** 2
ALPHA_BAR = np.multiply.accumulate(1 - BETAS)
SNR = ALPHA_BAR / (1 - ALPHA_BAR)
NUMBERS = {"min_snr": {"gamma": 5.0}, "soft_min_snr": {"gamma": 5.0}, "p2": {"gamma": 1.0, "k": 1.0},
           "edm": {"sigma_data": 0.5}}
T01 = torch.linspace(0, 1, 1001, dtype=torch.float64)


def on(path, t, kind: str, **numbers) -> np.ndarray:
    """The factor of the loss on the network's own target."""
    factor = conversion(path, t)
    return (weighting(kind, **numbers)(snr(path, t), factor) / factor).numpy()


def on_target(prediction: str, kind: str, **numbers) -> np.ndarray:
    """The same for Stable Diffusion's schedule, at every timestep."""
    return on(ddpm("scaled_linear", 0.00085, 0.012, 1000, prediction), torch.arange(1000), kind, **numbers)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_the_published_formula(gamma):
    clipped = np.where(SNR < gamma, SNR, gamma)
    np.testing.assert_allclose(on_target("epsilon", "min_snr", gamma=gamma), clipped / SNR, rtol=1e-9)
    np.testing.assert_allclose(on_target("v_prediction", "min_snr", gamma=gamma), clipped / (SNR + 1), rtol=1e-9)
    np.testing.assert_allclose(on_target("sample", "min_snr", gamma=gamma), clipped, rtol=1e-9)
    t = T01[1:]
    snr = ((1 - t) / t).numpy() ** 2
    flow = on(RectifiedFlow(), t, "min_snr", gamma=gamma)
    np.testing.assert_allclose(flow, np.minimum(snr, gamma) * t.numpy() ** 2, rtol=1e-9)


def test_the_snr_is_that_of_diffusers():
    path = ddpm("scaled_linear", 0.00085, 0.012, 1000, "epsilon")
    theirs = compute_snr(DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear"), torch.arange(1000))
    np.testing.assert_allclose(snr(path, torch.arange(1000)).numpy(), theirs.numpy(), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_uniform_weighs_every_error_of_the_target_the_same(prediction):
    assert (on_target(prediction, "uniform") == 1).all()


@pytest.mark.parametrize("path", [RectifiedFlow(), RectifiedFlow(3.0), Edm()], ids=str)
def test_uniform_is_one_up_to_both_ends(path):
    assert (on(path, path.time(T01, T01), "uniform") == 1).all()


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTINGS if kind != "uniform"])
def test_a_weighting_counts_the_same_error_of_x0_the_same_for_every_prediction(kind):
    """x0's error is b/a of eps' and b of v's: weights on targets differ by just that."""
    eps, v, x0 = (on_target(p, kind, **NUMBERS.get(kind, {})) for p in ("epsilon", "v_prediction", "sample"))
    np.testing.assert_allclose(v / eps, SNR / (SNR + 1), rtol=1e-9)
    np.testing.assert_allclose(x0 / eps, SNR, rtol=1e-9)


def test_published_formulas_for_eps():
    np.testing.assert_allclose(on_target("epsilon", "debiased"), SNR ** -0.5, rtol=1e-9)
    np.testing.assert_allclose(on_target("epsilon", "p2", gamma=0.5, k=2.0), (2 + SNR) ** -0.5, rtol=1e-9)
    np.testing.assert_allclose(on_target("epsilon", "soft_min_snr", gamma=4.0), 4 / (SNR + 4), rtol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_published_formulas_for_edm(sigma_data):
    """λ(σ) · c_out² = 1 (Karras et al. 2022), and k-diffusion's soft min-SNR, (σ·σ_data)² / (σ² + σ_data²)² on F."""
    path = Edm(sigma_data)
    sigma = path.time(T01[5:-5], T01)
    np.testing.assert_allclose(on(path, sigma, "edm", sigma_data=sigma_data), 1, rtol=1e-9)
    expected = ((sigma * sigma_data) ** 2 / (sigma ** 2 + sigma_data ** 2) ** 2).numpy()
    np.testing.assert_allclose(on(path, sigma, "soft_min_snr", gamma=sigma_data ** -2), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["sigma_sqrt", "cosmap"])
def test_weights_of_the_flow_are_those_of_diffusers(kind):
    t = T01[1:]
    theirs = compute_loss_weighting_for_sd3(kind, t)
    np.testing.assert_allclose(on(RectifiedFlow(), t, kind), theirs.double().numpy(), rtol=1e-6)


PATHS = [ddpm(schedule, 0.00085, 0.012, 1000, prediction, zero_snr)
         for schedule in ("linear", "scaled_linear", "cosine") for prediction in ("epsilon", "v_prediction", "sample")
         for zero_snr in (False, True) if not (zero_snr and prediction == "epsilon")]
PATHS += [ddpm("linear", 0.0, 0.012, 1000, p) for p in ("epsilon", "v_prediction", "sample")]      # begins without noise
PATHS += [RectifiedFlow(), RectifiedFlow(6.0), RectifiedFlow(0.1), Edm(), Edm(1.0)]


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_no_weight_is_ever_infinite(kind):
    ends = torch.tensor([2.0 ** -53, 1e-9, 1 - 1e-9, 1 - 2.0 ** -53], dtype=torch.float64)
    u = torch.cat([T01, ends])
    for path in PATHS:
        t = path.time(u, torch.full_like(u, 512 * 512))
        weight = torch.from_numpy(on(path, t, kind, **NUMBERS.get(kind, {}))).float()
        assert weight.isfinite().all() and (weight >= 0).all() and weight.max() > 0, path
        assert all(k.isfinite().all() for k in path.coefficients(t)) and path.told(t).isfinite().all()


def effective(path, u: torch.Tensor, law=uniform) -> tuple[np.ndarray, np.ndarray]:
    """λ = log SNR and the weight of eps' error per unit of λ, up to a factor, of the plain loss at the uniform numbers u."""
    t = path.time(law(u), torch.full_like(u, 512 * 512))
    a, b, c, d = (k.numpy() for k in path.coefficients(t))
    lam = 2 * np.log(a / b)
    density = -1 / np.gradient(lam, u.numpy())
    return lam[5:-5], (density * (d - c * b / a) ** 2)[5:-5]    # an error e of eps is an error (d − c·b/a)·e of the target


def matches(found: np.ndarray, published: np.ndarray, rtol: float) -> None:
    np.testing.assert_allclose(found / found.sum(), published / published.sum(), rtol=rtol)


def test_plain_losses_have_the_weights_of_the_sd3_paper():
    """Esser et al. 2024, §3: w_t of L_w = −½ E[w_t λ'_t ‖eps − eps_θ‖²], so a plain loss has w(λ) = its weight per λ."""
    u = torch.linspace(0.05, 0.95, 4001, dtype=torch.float64)
    lam, w = effective(RectifiedFlow(), u)
    t = u.numpy()[5:-5]
    matches(w, t / (1 - t), 1e-4)
    lam, w = effective(RectifiedFlow(), u, law("logit_normal", 0.0, 1.0, mean=0.5, scale=0.6))
    t = 1 / (1 + np.exp(lam / 2))
    logit = np.log(t / (1 - t))
    matches(w, t / (1 - t) * np.exp(-(logit - 0.5) ** 2 / (2 * 0.6 ** 2)) / (t * (1 - t)), 1e-3)     # eq. 18, 19
    lam, w = effective(RectifiedFlow(), u, law("cosmap", 0.0, 1.0))
    t = 1 / (1 + np.exp(lam / 2))
    matches(w, t / (1 - t) * 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t ** 2), 1e-3)                 # eq. 18, 22
    lam, w = effective(Edm(0.5), u, law("log_normal", 0.0, 1.0, mean=-1.2, scale=1.2))
    matches(w, np.exp(-(lam - 2.4) ** 2 / (2 * 2.4 ** 2)) * (np.exp(-lam) + 0.25), 1e-3)             # eq. 16
    steps = torch.arange(4000, dtype=torch.float64) / 4000 + 1 / 8000
    for prediction in ("v_prediction", "epsilon"):
        lam, w = effective(ddpm("cosine", 0.0, 0.0, 4000, prediction), steps)
        published = np.exp(-lam / 2) if prediction == "v_prediction" else 1 / np.cosh(lam / 2)
        matches(w[200:-200], published[200:-200], 0.05)         # the paper leaves out Nichol & Dhariwal's offset of 0.008


def test_an_unknown_weighting_is_no_other_weighting():
    with pytest.raises(KeyError):
        weighting("min_sn")
