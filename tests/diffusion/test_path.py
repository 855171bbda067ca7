import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from finetune.diffusion.path import Edm, RectifiedFlow, build, conversion, ddpm, noised, snr, target

SD = dict(beta_start=0.00085, beta_end=0.012, steps=1000)
T = torch.tensor([0, 1, 37, 500, 998, 999])
FRACTIONS = torch.linspace(0, 1, 101, dtype=torch.float64)
PIXELS = torch.full((101,), 512 * 512)
NAMES = {"cosine": "squaredcos_cap_v2"}


def alpha_bars(schedule: str) -> np.ndarray:
    """The product of 1 − beta, in numpy's float64."""
    if schedule == "cosine":
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        return np.multiply.accumulate([1 - min(0.999, 1 - f[i + 1] / f[i]) for i in range(1000)])
    root = np.sqrt([SD["beta_start"], SD["beta_end"]]) if schedule == "scaled_linear" else [SD["beta_start"], SD["beta_end"]]
    betas = np.array([root[0] + (root[1] - root[0]) * i / 999 for i in range(1000)])
    return np.multiply.accumulate(1 - betas ** (2 if schedule == "scaled_linear" else 1))


def scheduler(schedule: str, prediction: str = "epsilon", **more) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule=NAMES.get(schedule, schedule), beta_start=SD["beta_start"], beta_end=SD["beta_end"],
                         prediction_type=prediction, **more)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_the_schedule_is_the_formula_and_diffusers(schedule):
    path = ddpm(schedule, **SD, prediction="epsilon")
    assert path.steps == 1000 and path.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(path.alphas_cumprod.numpy(), alpha_bars(schedule), rtol=1e-11)
    # diffusers multiplies in float32
    torch.testing.assert_close(path.alphas_cumprod.float(), scheduler(schedule).alphas_cumprod, rtol=1e-3, atol=0)


def test_cosine_is_the_closed_form_where_it_is_not_clipped():
    """ᾱ_t = f(t) / f(0) (Nichol & Dhariwal 2021, eq. 17)."""
    def f(t):
        return np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2

    at = np.arange(1, 1000)
    found = ddpm("cosine", **SD, prediction="epsilon").alphas_cumprod
    np.testing.assert_allclose(found[:-1].numpy(), f(at) / f(0), rtol=1e-9)
    assert torch.equal(ddpm("squaredcos_cap_v2", **SD, prediction="epsilon").alphas_cumprod, found)


def test_an_unknown_schedule_is_no_other_schedule():
    with pytest.raises(ValueError, match="laplace"):
        ddpm("laplace", **SD, prediction="epsilon")


def test_betas_of_ones_own():
    path = ddpm([0.1, 0.5, 1.0], 0, 0, 3, "v_prediction")
    np.testing.assert_allclose(path.alphas_cumprod.numpy(), [0.9, 0.45, 0], rtol=1e-12)
    for wrong in ([0.1, 0.2], [0.1, 0.2, 1.1], [0.1, 0.0, 0.2], [0.1, math.nan, 0.2]):
        with pytest.raises(ValueError, match="betas are not 3 numbers"):
            ddpm(wrong, 0, 0, 3, "v_prediction")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_zero_snr_is_the_algorithm_and_ends_without_signal(schedule):
    """Lin et al. 2024, algorithm 1, as printed: through √ᾱ back to betas."""
    root = np.sqrt(alpha_bars(schedule))
    moved = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas = np.concatenate([[moved[0] ** 2], moved[1:] ** 2 / moved[:-1] ** 2])
    path = ddpm(schedule, **SD, prediction="v_prediction", zero_snr=True)
    np.testing.assert_allclose(path.alphas_cumprod.numpy(), np.multiply.accumulate(alphas), rtol=1e-9)
    assert path.alphas_cumprod[-1] == 0 and path.alphas_cumprod[0] == pytest.approx(alpha_bars(schedule)[0], rel=1e-12)
    theirs = scheduler(schedule, "v_prediction", rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(path.alphas_cumprod.float(), theirs, rtol=2e-3, atol=1e-7)
    assert snr(path, torch.tensor([999])) == 0 and conversion(path, torch.tensor([999])) == 1


@pytest.mark.parametrize("schedule", ["linear", [1.0]])
def test_epsilon_without_signal_is_refused(schedule):
    with pytest.raises(ValueError, match="v_prediction can"):
        ddpm(schedule, 0.1, 0.2, 1 if schedule == [1.0] else 1000, "epsilon", zero_snr=schedule != [1.0])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noised_pictures_and_targets_are_those_of_diffusers(prediction):
    torch.manual_seed(0)
    path, theirs = ddpm("scaled_linear", **SD, prediction=prediction), scheduler("scaled_linear", prediction)
    x0, noise = torch.randn(6, 4, 3, 5), torch.randn(6, 4, 3, 5)
    x_t, wanted = noised(path, x0, noise, T), target(path, x0, noise, T)
    assert x_t.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(x_t, theirs.add_noise(x0, noise, T), rtol=1e-4, atol=1e-5)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": theirs.get_velocity(x0, noise, T)}[prediction]
    torch.testing.assert_close(wanted, expected, rtol=1e-4, atol=1e-5)


def test_v_is_the_formula():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 6, 2, 2, 2, dtype=torch.float64)
    v = target(ddpm("scaled_linear", **SD, prediction="v_prediction"), x0, noise, T)
    for i, t in enumerate(T):
        alpha_bar = alpha_bars("scaled_linear")[t]
        torch.testing.assert_close(v[i], alpha_bar ** 0.5 * noise[i] - (1 - alpha_bar) ** 0.5 * x0[i], rtol=1e-10, atol=1e-12)


PATHS = {
    "epsilon": ddpm("scaled_linear", **SD, prediction="epsilon"),
    "v": ddpm("scaled_linear", **SD, prediction="v_prediction"),
    "v zero": ddpm("scaled_linear", **SD, prediction="v_prediction", zero_snr=True),
    "x0": ddpm("cosine", **SD, prediction="sample"),
    "rf": RectifiedFlow(shift=3.0), "edm": Edm(), "edm 1": Edm(1.0),
}


@pytest.mark.parametrize("name", PATHS)
def test_an_error_of_the_target_is_an_error_of_x0_by_the_conversion(name):
    """Solve x_t = a·x0 + b·noise and target = c·x0 + d·noise for x0, with the target off by 1."""
    path, inner = PATHS[name], slice(5, 96)
    t = path.time(FRACTIONS, PIXELS)
    a, b, c, d = (k.numpy()[inner] for k in path.coefficients(t))
    error_of_x0 = b / (b * c - a * d)       # Cramer's rule
    np.testing.assert_allclose(conversion(path, t).numpy()[inner], 1 / error_of_x0 ** 2, rtol=1e-9)
    np.testing.assert_allclose(snr(path, t).numpy()[inner], (a / b) ** 2, rtol=1e-9)


@pytest.mark.parametrize("name", ["epsilon", "v", "v zero", "x0"])
def test_discrete_paths_keep_the_variance_and_know_every_step(name):
    path, t = PATHS[name], torch.arange(1000)
    a, b, _, _ = path.coefficients(t)
    np.testing.assert_allclose((a ** 2 + b ** 2).numpy(), 1, rtol=1e-12)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert torch.bincount(path.time(u, u), minlength=1000).tolist() == [100] * 1000
    assert path.time(torch.tensor([0.0, 1.0], dtype=torch.float64), u[:2]).tolist() == [0, 999]
    assert torch.equal(path.told(t), t)


def test_a_rectified_flow_is_a_straight_line_and_its_velocity():
    torch.manual_seed(0)
    path, x0, noise = RectifiedFlow(), torch.randn(101, 2, 2, 2), torch.randn(101, 2, 2, 2)
    t = path.time(FRACTIONS, PIXELS)
    assert torch.equal(t, FRACTIONS)
    column = t.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(noised(path, x0, noise, t), (1 - column) * x0 + column * noise)
    torch.testing.assert_close(target(path, x0, noise, t), noise - x0)
    torch.testing.assert_close(path.told(t), 1000 * t.float())


def test_the_shift_is_that_of_the_paper_and_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = FlowMatchEulerDiscreteScheduler(1000, shift=3.0).sigmas.double()
    own = RectifiedFlow(shift=3.0).time(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000, PIXELS)
    torch.testing.assert_close(own, sigmas, rtol=1e-6, atol=1e-7)
    # eq. 23: from n = 256² to m = 1024² and 512 · 2048 pixels
    t, root = FRACTIONS[1:-1], 4
    expected = root * t / (1 + (root - 1) * t)
    for pixels in (1024 * 1024, 512 * 2048):
        shifted = RectifiedFlow(reference=256).time(t, torch.full((99,), pixels))
        torch.testing.assert_close(shifted, expected)
    twice = RectifiedFlow(shift=3.0, reference=256).time(t, torch.full((99,), 1024 * 1024))
    torch.testing.assert_close(twice, RectifiedFlow(shift=12.0).time(t, PIXELS))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_the_preconditioning_of_the_paper(sigma_data):
    """Karras et al. 2022, table 1 and eq. 7: D(x) = c_skip·x + c_out·F(c_in·x; c_noise)."""
    torch.manual_seed(0)
    x0, noise = sigma_data * torch.randn(101, 2, 2, 2, dtype=torch.float64), torch.randn(101, 2, 2, 2, dtype=torch.float64)
    path = Edm(sigma_data)
    t = path.time(FRACTIONS, PIXELS)
    sigma = np.clip(FRACTIONS.numpy() / np.maximum(1 - FRACTIONS.numpy(), 1e-300), 1e-4, 1e4)
    np.testing.assert_allclose(t.numpy(), sigma, rtol=1e-12)
    np.testing.assert_allclose(path.told(t).numpy(), np.log(sigma) / 4, rtol=1e-6)
    total = sigma ** 2 + sigma_data ** 2
    c_skip, c_out, c_in = sigma_data ** 2 / total, sigma * sigma_data / total ** 0.5, total ** -0.5
    one = (slice(None), None, None, None)
    x = x0.numpy() + sigma[one] * noise.numpy()
    np.testing.assert_allclose(noised(path, x0, noise, t).numpy(), c_in[one] * x, rtol=1e-9, atol=1e-12)
    denoised = c_skip[one] * x + c_out[one] * target(path, x0, noise, t).numpy()
    np.testing.assert_allclose(denoised, x0.numpy(), rtol=1e-8, atol=1e-8)
    inner = slice(1, 100)
    np.testing.assert_allclose(conversion(path, t).numpy()[inner] * c_out[inner] ** 2, 1, rtol=1e-9)     # λ(σ) · c_out² = 1
    np.testing.assert_allclose(snr(path, t).numpy()[inner], sigma[inner] ** -2, rtol=1e-9)
    assert 0.9 < target(path, x0, noise, t)[20:80].std() < 1.1       # unit variance is what it is for


def test_edm_of_unit_data_is_v_with_the_other_sign():
    torch.manual_seed(0)
    x0, noise = torch.randn(101, 2, 2, 2, dtype=torch.float64), torch.randn(101, 2, 2, 2, dtype=torch.float64)
    path = Edm(1.0)
    t = path.time(FRACTIONS, PIXELS)
    a, b, _, _ = (k.view(-1, 1, 1, 1) for k in path.coefficients(t))
    torch.testing.assert_close(target(path, x0, noise, t), -(a * noise - b * x0))


def test_the_words_of_a_recipe_build_paths():
    assert build("rf", shift=2.0) == RectifiedFlow(2.0) and build("edm", sigma_data=1.0) == Edm(1.0)
    path = build("ddpm", schedule="cosine", beta_start=0.1, beta_end=0.2, prediction="v_prediction", zero_snr=True)
    assert path.steps == 1000 and path.prediction == "v_prediction" and path.alphas_cumprod[-1] == 0
