import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from finetune.diffusion.path import ddpm

SD = dict(start=0.00085, end=0.012, steps=1000)
T = torch.tensor([0, 1, 37, 500, 998, 999])


def alpha_bars(schedule: str) -> np.ndarray:
    """The product of 1 − beta, in numpy's float64."""
    root = np.sqrt([SD["start"], SD["end"]]) if schedule == "scaled_linear" else [SD["start"], SD["end"]]
    betas = np.array([root[0] + (root[1] - root[0]) * i / 999 for i in range(1000)])
    return np.multiply.accumulate(1 - betas ** (2 if schedule == "scaled_linear" else 1))


def scheduler(schedule: str, prediction: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(beta_schedule=schedule, beta_start=SD["start"], beta_end=SD["end"], prediction_type=prediction)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_the_schedule_is_the_formula_and_diffusers(schedule):
    path = ddpm(schedule, **SD, prediction="epsilon")
    assert path.steps == 1000 and path.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(path.alphas_cumprod.numpy(), alpha_bars(schedule), rtol=1e-12)
    # diffusers multiplies in float32
    torch.testing.assert_close(path.alphas_cumprod.float(), scheduler(schedule).alphas_cumprod, rtol=2e-5, atol=0)


def test_an_unknown_schedule_is_no_other_schedule():
    with pytest.raises(ValueError, match="squaredcos"):
        ddpm("squaredcos_cap_v2", **SD, prediction="epsilon")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noised_pictures_and_targets_are_those_of_diffusers(prediction):
    torch.manual_seed(0)
    path, theirs = ddpm("scaled_linear", **SD, prediction=prediction), scheduler("scaled_linear", prediction)
    x0, noise = torch.randn(6, 4, 3, 5), torch.randn(6, 4, 3, 5)
    x_t, target = path.noised(x0, noise, T)
    assert x_t.dtype == target.dtype == torch.float32
    torch.testing.assert_close(x_t, theirs.add_noise(x0, noise, T), rtol=1e-4, atol=1e-5)
    expected = noise if prediction == "epsilon" else theirs.get_velocity(x0, noise, T)
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)


def test_v_is_the_formula():
    torch.manual_seed(0)
    x0, noise = torch.randn(6, 2, 2, 2, dtype=torch.float64), torch.randn(6, 2, 2, 2, dtype=torch.float64)
    _, v = ddpm("scaled_linear", **SD, prediction="v_prediction").noised(x0, noise, T)
    for i, t in enumerate(T):
        alpha_bar = alpha_bars("scaled_linear")[t]
        torch.testing.assert_close(v[i], alpha_bar ** 0.5 * noise[i] - (1 - alpha_bar) ** 0.5 * x0[i], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_error_of_the_target_is_an_error_of_x0_by_the_conversion(prediction):
    """Solve x_t = a·x0 + b·noise and target = c·x0 + d·noise for x0, with the target off by 1."""
    path, t = ddpm("scaled_linear", **SD, prediction=prediction), torch.arange(1000)
    a, b, c, d = (k.numpy() for k in path.coefficients(t))
    error_of_x0 = b / (b * c - a * d)       # Cramer's rule
    np.testing.assert_allclose(path.conversion(t).numpy(), 1 / error_of_x0 ** 2, rtol=1e-9)
    np.testing.assert_allclose(path.snr(t).numpy(), alpha_bars("scaled_linear") / (1 - alpha_bars("scaled_linear")), rtol=1e-9)
    np.testing.assert_allclose(a ** 2 + b ** 2, 1, rtol=1e-12)
