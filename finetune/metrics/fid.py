"""Fréchet distance of all pictures to all training pictures (Heusel et al. 2017, eq. 6) on DINO's features; biased for few."""

import numpy as np

from finetune.metrics.base import Measured, Painted

NEEDS, MODEL, BETTER = {"training", "many"}, "facebook/dinov2-base", "lower"


def measure(painted: Painted, eye) -> dict[str, Measured]:
    x, y = eye.pictures(painted.pictures), eye.pictures(painted.training)
    return {"fid": Measured(len(x), lambda w_RN: np.full(len(w_RN), frechet(x, y)), resampled=False)}


def frechet(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """|μx − μy|² + tr(Cx + Cy − 2 (Cx Cy)^½). The trace of the root is the sum of the singular values of X Yᵀ, centred and
    over √(N − 1): no matrix of D × D is needed. No interval: of pictures drawn anew fewer are different, and it is larger."""
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x_ND, y_MD))
    roots = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(np.square(x_ND.mean(0) - y_MD.mean(0)).sum() + np.square(a).sum() + np.square(b).sum() - 2 * roots)
