"""An exponential moving average of the trained parameters."""

from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Averages `parameters`; early steps use a smaller decay, (1 + n) / (10 + n), so that the start is forgotten."""

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.decay = decay
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer's step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [p.float() for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def swapped(self):
        """Inside, the parameters hold their averages."""
        kept = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        try:
            self._fill(self.average)
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
