"""The heart: noise the latents, let the denoiser predict, weigh the error.

    loss = mean over the batch of  weight_i · w(t_i) · mean over pixels of (prediction − target)²
"""

from dataclasses import dataclass

from finetune.batch import Batch, Losses
from finetune.diffusion import noise
from finetune.diffusion.timesteps import LAWS
from finetune.diffusion.weights import Weighting, weighting


@dataclass(frozen=True)
class Denoise:
    timesteps: str
    weight: Weighting

    def __call__(self, family, batch: Batch, seed: int) -> Losses:
        device, positions, path = batch.weight.device, batch.positions, family.path
        latents = batch.latents
        if latents is None:
            moments = family.moments(batch.pixels)
            shape = (moments.shape[1] // 2, *moments.shape[2:])
            latents = family.latents(moments, noise.normal(shape, seed, positions, "posterior").to(device))
        conditioning = batch.conditioning or family.encode_text(batch.captions)
        t = LAWS[self.timesteps](noise.uniforms(seed, positions, "timestep"), path.steps)     # on the CPU, as all of the path
        epsilon = noise.normal(latents.shape[1:], seed, positions, "noise").to(device)
        x_t, target = path.noised(latents, epsilon, t)
        prediction = family.denoise(x_t, t.to(device), conditioning, batch.geometry)
        per_example = (prediction - target).square().mean(dim=(1, 2, 3))
        conversion = path.conversion(t)
        weight = (self.weight(path.snr(t), conversion) / conversion).float().to(device)
        return Losses((batch.weight * weight * per_example).mean(), per_example.detach(), t)


def build(timesteps: str, weighting_kind: str, gamma: float) -> Denoise:
    return Denoise(timesteps, weighting(weighting_kind, gamma))
