"""Kernel distance of all pictures to all training pictures: the unbiased MMD² of Bińkowski et al. 2018, on DINO's features."""

import numpy as np

from finetune.metrics.base import Measured, Painted, over_pairs

NEEDS, MODEL, BETTER = {"training", "many"}, "facebook/dinov2-base", "lower"


def measure(painted: Painted, eye) -> dict[str, Measured]:
    return {"kid": kernel_distance(eye.pictures(painted.pictures), eye.pictures(painted.training))}


def kernel_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> Measured:
    """mean k(x, x') + mean k(y, y') − 2 mean k(x, y) over pairs of different pictures, with k(a, b) = (a·b / D + 1)³ (§4).
    Below 0 is chance: it is unbiased. The training pictures are what they are: only x is drawn anew."""
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = over_pairs(kernel(x_ND, x_ND), np.ones((len(x_ND),) * 2))
    among = over_pairs(kernel(y_MD, y_MD), np.ones((len(y_MD),) * 2))(np.ones((1, len(y_MD))))
    across = kernel(x_ND, y_MD).mean(1)
    return Measured(len(x_ND), lambda w_RN: within(w_RN) + among - 2 * (w_RN @ across) / w_RN.sum(1))
