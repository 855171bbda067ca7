"""The heart: noise the latents, let the denoiser predict, weigh the error.

    loss = share · sum over the batch of  weight_i · w(t_i) · mean over the mask of cost(prediction − target)
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from finetune.batch import Batch, Losses
from finetune.diffusion import losses, noise, weights
from finetune.diffusion import path as paths
from finetune.diffusion import timesteps as laws
from finetune.diffusion.epsilon import Epsilon
from finetune.diffusion.losses import Loss
from finetune.diffusion.path import Path
from finetune.diffusion.timesteps import Law
from finetune.diffusion.weights import Weighting


@dataclass(frozen=True)
class Denoise:
    """The words of a recipe as functions; `path` None is the base's own."""

    path: Path | None = None
    law: Law = laws.uniform
    strata: int = 1
    weight: Weighting = weights.uniform
    epsilon: Epsilon = Epsilon()
    loss: Loss = losses.l2

    networks: ClassVar = {}

    def __call__(self, family, batch: Batch, seed: int) -> Losses:
        device, positions, path = batch.weight.device, batch.positions, self.path or family.path
        x0 = latents(family, batch, seed)
        conditioning = batch.conditioning or family.encode_text(batch.captions)
        if batch.beside is not None:
            conditioning = replace(conditioning, **family.beside(batch.beside, seed, positions))
        fraction = self.law(laws.draw(seed, positions, self.strata))
        pixels = torch.full((len(x0),), x0[0, 0].numel() * family.stride ** 2)
        t = path.time(fraction, pixels)     # on the CPU, as all of the path
        snr, conversion = paths.snr(path, t), paths.conversion(path, t)
        epsilon = self.epsilon.draw(x0.shape[1:], seed, positions)
        # What the CPU has to say comes before the forward: a copy waits for what a GPU was given before it.
        x_t = paths.noised(path, x0, self.epsilon.perturbed(epsilon, seed, positions).to(device, non_blocking=True), t)
        target = paths.target(path, x0, epsilon.to(device, non_blocking=True), t)
        told = path.told(t).to(device, non_blocking=True)
        weight = (self.weight(snr, conversion) / conversion).float().to(device, non_blocking=True)
        prediction = family.denoise(x_t, told, conditioning, batch.geometry)
        cost = self.loss(prediction - target, snr).mean(1, keepdim=True)
        mask = torch.ones_like(cost) if batch.mask is None else batch.mask
        # A random crop may hold nothing of its mask: it counts nothing.
        per_example = (mask * cost).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)).clamp(min=1e-6)
        return Losses((batch.weight * weight * per_example).sum() * batch.share, per_example.detach(), t)


def latents(family, batch: Batch, seed: int) -> Tensor:
    """(B, C, h, w): the batch's own, or a sample of its pixels' posterior."""
    if batch.latents is not None:
        return batch.latents
    moments = family.moments(batch.pixels)
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    return family.latents(moments, noise.normal(shape, seed, batch.positions, "posterior").to(moments.device))


def build(timesteps: dict, weighting: dict, noise: dict, loss: dict, step_size: int, path: dict | None = None) -> Denoise:
    """The fields of the recipe, without those that are null; `step_size` is the number of examples of a step."""
    stratified = timesteps.pop("stratified")
    return Denoise(path and paths.build(**path), laws.law(**timesteps), step_size if stratified else 1,
                   weights.weighting(**weighting), Epsilon(**noise), losses.loss(**loss))
