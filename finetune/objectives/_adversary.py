"""A patch discriminator (Isola et al. 2017, as LDM has it) that learns beside what it judges, and what both lose by it.

Two things are otherwise than in the papers, so that a batch still costs what its examples cost and a step stays one backward.
It normalises in groups, not over the batch. And Esser et al.'s adaptive weight (2021, eq. 7) is each picture's own: the
ratio of the gradients at the picture that was drawn, in place of those at the decoder's last layer, summed over a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu

from finetune.device import exact

OF_HINGE = 0.01     # how much it counts: to Adam it is all the same, but of 1 the clip and the log would see nothing else


@dataclass(frozen=True)
class Adversary:
    weight: float
    start: int              # the position of the first example whose drawing it judges
    network: nn.Module      # (B, 3, H, W) in [-1, 1] → (B, 1, H/8, W/8): above 0 where it takes a patch for real

    def __call__(self, drawn: Tensor, x: Tensor, cost: Tensor, position: int) -> Tensor:
        """(B,) what is added to each picture's `cost`. Its gradient for `drawn` is `weight` times as long as that of the
        cost, or 0 before the start; its gradient for the network is that of a share of the hinge loss (Lim & Ye 2017)."""
        with exact(x):
            told = OF_HINGE / 2 * (relu(1 - self.network(x)) + relu(1 + self.network(drawn.detach()))).mean(dim=(1, 2, 3))
            if position < self.start:
                return told
            resting = {name: p.detach() for name, p in self.network.named_parameters()}
            seen_through = -functional_call(self.network, resting, drawn).mean(dim=(1, 2, 3))
            lengths = [torch.autograd.grad(loss.sum(), drawn, retain_graph=True)[0].flatten(1).norm(dim=1)
                       for loss in (cost, seen_through)]
            return told + self.weight * lengths[0] / lengths[1].clamp_min(1e-12) * seen_through


def network(width: int = 64) -> nn.Sequential:
    """The same weights at every start of every run."""
    def block(wide: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(wide, out, 4 if stride == 2 else 3, stride, 1, bias=False), nn.GroupNorm(out // 16, out),
                nn.LeakyReLU(0.2)]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), *block(width, 2 * width, 2), *block(2 * width, 4 * width, 2),
            *block(4 * width, 8 * width, 1), nn.Conv2d(8 * width, 1, 3, 1, 1))
