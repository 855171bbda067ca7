import numpy as np
import pytest
import torch

from finetune.diffusion.path import ddpm
from finetune.diffusion.timesteps import LAWS
from finetune.diffusion.weights import weighting

T = torch.arange(1000)
BETAS = (0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * np.arange(1000) / 999) ** 2
ALPHA_BAR = np.multiply.accumulate(1 - BETAS)
SNR = ALPHA_BAR / (1 - ALPHA_BAR)


def on_target(prediction: str, kind: str, gamma: float = 5.0) -> np.ndarray:
    """The factor of the loss on the network's own target, at every timestep."""
    path = ddpm("scaled_linear", 0.00085, 0.012, 1000, prediction)
    conversion = path.conversion(T)
    return (weighting(kind, gamma)(path.snr(T), conversion) / conversion).numpy()


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_the_published_formula(gamma):
    clipped = np.where(SNR < gamma, SNR, gamma)
    np.testing.assert_allclose(on_target("epsilon", "min_snr", gamma), clipped / SNR, rtol=1e-9)
    np.testing.assert_allclose(on_target("v_prediction", "min_snr", gamma), clipped / (SNR + 1), rtol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_uniform_weighs_every_error_of_the_target_the_same(prediction):
    assert (on_target(prediction, "uniform") == 1).all()


def test_min_snr_counts_the_same_error_of_x0_the_same_for_both_predictions():
    """x0's error is b/a of eps' and b of v's: weights on targets differ by just that."""
    ratio = on_target("v_prediction", "min_snr") / on_target("epsilon", "min_snr")
    np.testing.assert_allclose(ratio, SNR / (SNR + 1), rtol=1e-9)


def test_an_unknown_weighting_is_no_other_weighting():
    with pytest.raises(KeyError):
        weighting("min_sn")


def test_uniform_timesteps_are_all_drawn_equally_often():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = torch.bincount(LAWS["uniform"](u, 1000), minlength=1000)
    assert counts.tolist() == [100] * 1000


def test_the_ends_of_the_unit_interval_are_timesteps():
    u = torch.tensor([0.0, 1 - 2.0 ** -53], dtype=torch.float64)
    for law in LAWS.values():
        t = law(u, 1000)
        assert t.dtype == torch.int64 and 0 <= t.min() and t.max() <= 999
