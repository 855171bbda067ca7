"""The loss of every path, law, weighting and cost against what the papers print, written out once more in numpy's float64.

Nothing here comes from finetune/diffusion but the draws: noise, and uniform numbers."""

from math import cos, pi
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune.batch import Batch, Conditioning
from finetune.diffusion import noise
from finetune.diffusion.path import ddpm
from finetune.objectives.denoise import build
from finetune.recipe.objective import Objective

SEED, POSITIONS, SIDE = 3, [5, 6, 7, 8], 48
EXAMPLES = np.array([1.0, 2.0, 0.5, 1.0])       # their weights


def alpha_bars(schedule: str, zero_snr: bool) -> np.ndarray:
    i = np.arange(1000) / 999
    if schedule == "cosine":                    # Nichol & Dhariwal 2021, eq. 17
        f = [cos((t / 1000 + 0.008) / 1.008 * pi / 2) ** 2 for t in range(1001)]
        betas = np.minimum(1 - np.array(f[1:]) / np.array(f[:-1]), 0.999)
    elif schedule == "linear":                  # Ho et al. 2020
        betas = 0.00085 + (0.012 - 0.00085) * i
    else:                                       # Rombach et al. 2022
        betas = (0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * i) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:                                # Lin et al. 2024, algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root ** 2


def discrete(schedule: str, prediction: str, zero_snr: bool, x0, eps, fraction):
    t = np.minimum(np.floor(1000 * fraction), 999).astype(int)
    alpha_bar = alpha_bars(schedule, zero_snr)[t]
    a, b = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    A, B = column(a), column(b)
    target, slope = {"epsilon": (eps, b / a), "v_prediction": (A * eps - B * x0, b), "sample": (x0, 1)}[prediction]
    return A * x0 + B * eps, t, target, b / a, slope


def flow(shift: float, x0, eps, fraction):      # Esser et al. 2024, eq. 13 and 23
    t = shift * fraction / (1 + (shift - 1) * fraction)
    return column(1 - t) * x0 + column(t) * eps, 1000 * t, eps - x0, t / (1 - t), t


def edm(data: float, x0, eps, fraction):        # Karras et al. 2022, table 1
    sigma = fraction / (1 - fraction)
    total = sigma ** 2 + data ** 2
    c_skip, c_out, c_in = data ** 2 / total, sigma * data / np.sqrt(total), 1 / np.sqrt(total)
    x = x0 + column(sigma) * eps
    return column(c_in) * x, np.log(sigma) / 4, (x0 - column(c_skip) * x) / column(c_out), sigma, c_out


def column(numbers) -> np.ndarray:
    return numbers[:, None, None, None]


# Words of a recipe → x_t, what the network is told, its target, σ in units of the signal, and what an error of x0 is of one
# of the target.
PATHS = [({"kind": "ddpm", "schedule": s, "prediction": p, "zero_snr": z}, lambda *k, s=s, p=p, z=z: discrete(s, p, z, *k))
         for s in ("linear", "scaled_linear", "cosine") for p in ("epsilon", "v_prediction", "sample") for z in (False, True)
         if not (z and p == "epsilon")]
PATHS += [(None, lambda *k: discrete("scaled_linear", "epsilon", False, *k)),       # the base's own
          ({"kind": "rf", "shift": 1.0}, lambda *k: flow(1.0, *k)), ({"kind": "rf", "shift": 3.0}, lambda *k: flow(3.0, *k)),
          ({"kind": "rf", "shift": 1.5, "reference": 24}, lambda *k: flow(1.5 * SIDE / 24, *k)),
          ({"kind": "edm"}, lambda *k: edm(0.5, *k)), ({"kind": "edm", "sigma_data": 1.0}, lambda *k: edm(1.0, *k))]


def logistic(u, mean, scale):
    return 1 / (1 + np.exp(-(mean + scale * np.array([NormalDist().inv_cdf(p) for p in u]))))


LAWS = [({"kind": "uniform"}, lambda u: u), ({"kind": "uniform", "min": 0.2, "max": 0.7}, lambda u: 0.2 + 0.5 * u),
        ({"kind": "logit_normal", "mean": 0.5, "scale": 0.6}, lambda u: logistic(u, 0.5, 0.6)),
        ({"kind": "sigmoid", "scale": 0.7}, lambda u: logistic(u, 0, 0.7)),
        ({"kind": "mode", "scale": 1.29}, lambda u: 1 - u - 1.29 * (np.cos(pi / 2 * u) ** 2 - 1 + u)),
        ({"kind": "cosmap"}, lambda u: 1 - 1 / (np.tan(pi / 2 * u) + 1)),
        ({"kind": "log_normal", "mean": -1.2, "scale": 1.2}, lambda u: logistic(u, -1.2, 1.2))]

# (σ, the slope of x0 by the target) → the weight of the target's error. What a paper says of eps is times 1/σ² for x0, what
# it says of the flow times 1/t², t = σ / (1 + σ).
WEIGHTS = [({"kind": "uniform"}, lambda s, k: 1 + 0 * s),
           ({"kind": "min_snr", "gamma": 5.0}, lambda s, k: np.minimum(s ** -2, 5) * k ** 2),       # Hang et al. 2023
           ({"kind": "soft_min_snr", "gamma": 4.0}, lambda s, k: 4 / (1 + 4 * s ** 2) * k ** 2),    # Crowson et al. 2024
           ({"kind": "debiased"}, lambda s, k: s / s ** 2 * k ** 2),                                # Yu et al. 2024
           ({"kind": "p2", "gamma": 0.5, "k": 2.0}, lambda s, k: (2 + s ** -2) ** -0.5 / s ** 2 * k ** 2),  # Choi et al. 2022
           ({"kind": "edm", "sigma_data": 0.5}, lambda s, k: (s ** 2 + 0.25) / (0.5 * s) ** 2 * k ** 2),
           ({"kind": "sigma_sqrt"}, lambda s, k: ((1 + s) / s) ** 4 * k ** 2),
           ({"kind": "cosmap"}, lambda s, k: 2 / (pi - 2 * pi * s / (1 + s) + 2 * pi * (s / (1 + s)) ** 2)
            * ((1 + s) / s) ** 2 * k ** 2)]


def huber(e, c):
    return 2 * c * (np.sqrt(e ** 2 + c ** 2) - c)


COSTS = [({"kind": "l2"}, lambda e, s: e ** 2), ({"kind": "l1"}, lambda e, s: np.abs(e)),
         ({"kind": "huber", "c": 0.2}, lambda e, s: huber(e, 0.2)),
         ({"kind": "huber", "c": 0.2, "schedule": "snr"}, lambda e, s: huber(e, column(0.8 / (1 + s) ** 2 + 0.2)))]


@pytest.mark.parametrize("words, path", PATHS, ids=[str(words) for words, _ in PATHS])
def test_the_loss_is_the_papers(words, path):
    latents = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    batch = Batch(POSITIONS, [""] * 4, torch.tensor(EXAMPLES).float(), 1 / 4,
                  torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 4), latents=latents,
                  conditioning=Conditioning(torch.zeros(4, 1, 1)))
    family = SimpleNamespace(stride=SIDE // 3, path=ddpm("scaled_linear", 0.00085, 0.012, 1000, "epsilon"),
                             denoise=lambda x, t, *_: 0.5 * x + 1e-3 * t.float().view(-1, 1, 1, 1))
    x0, eps = latents.double().numpy(), noise.normal((4, 3, 3), SEED, POSITIONS, "noise").double().numpy()
    u = noise.uniforms(SEED, POSITIONS, "timestep").numpy()
    chosen = [(law, weight, COSTS[0]) for law in LAWS for weight in WEIGHTS] + [(LAWS[0], WEIGHTS[1], cost) for cost in COSTS]
    for (timesteps, law), (weighting, weigh), (loss, cost) in chosen:
        if timesteps["kind"] == "log_normal" and (words or {}).get("kind") != "edm":
            continue
        x_t, told, target, sigma, slope = path(x0, eps, law(u))
        error = (cost(0.5 * x_t + 1e-3 * column(told) - target, sigma)).mean((1, 2, 3))
        fields = Objective.model_validate({"path": words, "timesteps": timesteps, "weighting": weighting, "loss": loss})
        found = build(**fields.model_dump(exclude={"kind"}, exclude_none=True), step_size=4)(family, batch, SEED)
        what = f"{timesteps} {weighting} {loss}"
        np.testing.assert_allclose(found.per_example.numpy(), error, rtol=1e-4, err_msg=what)
        np.testing.assert_allclose(found.loss.item(), (EXAMPLES * weigh(sigma, slope) * error).mean(), rtol=1e-4, err_msg=what)
