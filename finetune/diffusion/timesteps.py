"""Which timesteps are trained: functions from a uniform number u in [0, 1) to an integer timestep."""

from torch import Tensor


def uniform(u: Tensor, steps: int) -> Tensor:
    """Each of the `steps` timesteps equally often. u (B,) float64 → (B,) int64."""
    return (u * steps).long().clamp(max=steps - 1)


LAWS = {"uniform": uniform}
