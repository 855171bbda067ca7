import numpy as np
import pytest
import torch

from finetune.diffusion.losses import loss

ERROR = torch.linspace(-4, 4, 2 * 4 * 3 * 3, dtype=torch.float64).view(2, 4, 3, 3)
SNR = torch.tensor([1e6, 0.25], dtype=torch.float64)


def test_l2_and_l1():
    assert torch.equal(loss("l2")(ERROR, SNR), ERROR ** 2)
    assert torch.equal(loss("l1")(ERROR, SNR), ERROR.abs())


@pytest.mark.parametrize("c", [0.01, 0.1, 1.0])
def test_huber_is_the_formula(c):
    e = ERROR.numpy()
    found = loss("huber", c=c, schedule="constant")(ERROR, SNR).numpy()
    np.testing.assert_allclose(found, 2 * c * ((e ** 2 + c ** 2) ** 0.5 - c), rtol=1e-9)


def test_huber_is_l2_of_small_errors_and_l1_of_large():
    huber, small = loss("huber", c=0.1, schedule="constant"), torch.full((1, 1, 1, 1), 1e-4)
    torch.testing.assert_close(huber(small, SNR[:1]), small ** 2, rtol=1e-5, atol=0)        # float32 too
    torch.testing.assert_close(huber(1e6 * small, SNR[:1]), 0.2 * (1e6 * small), rtol=2e-3, atol=0)


def test_huber_by_snr_is_that_of_kohya():
    """huber_c at each timestep: (1 − c) / (1 + σ)² + c with σ = 1/√SNR (sd-scripts, huber_schedule snr)."""
    sigma = SNR.numpy() ** -0.5
    c = ((1 - 0.1) / (1 + sigma) ** 2 + 0.1)[:, None, None, None]
    expected = 2 * c * ((ERROR.numpy() ** 2 + c ** 2) ** 0.5 - c)
    np.testing.assert_allclose(loss("huber", c=0.1, schedule="snr")(ERROR, SNR).numpy(), expected, rtol=1e-9)
    assert loss("huber", c=0.1, schedule="snr")(ERROR, torch.zeros(2).double()).isfinite().all()
