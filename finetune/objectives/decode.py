"""Draw the picture that the latent was made of: the loss of an autoencoder.

    loss = share · sum over the batch of  weight_i · (pixels + ssim (1 − SSIM) + gradient ∇ + lpips LPIPS + regularizer)

The regularizer, KL or commitment, counts where the encoder is trained too; else the latent is a constant. An adversary adds
its own to each example, see _adversary.py, but not to what is told of it, which is compared over a run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune import device
from finetune.batch import Batch, Losses
from finetune.diffusion import noise
from finetune.objectives import _adversary as adversary
from finetune.objectives import _similarity as similarity
from finetune.objectives._adversary import Adversary


@dataclass(frozen=True)
class Decode:
    """The words of a recipe; `lpips` is its weight and its network, which is nobody's to train."""

    pixels: str
    ssim: float
    gradient: float
    lpips: tuple[float, nn.Module] | None
    sample: bool
    kl: float
    commitment: float
    adversary: Adversary | None

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"discriminator": self.adversary.network} if self.adversary else {}

    def __call__(self, family, batch: Batch, seed: int) -> Losses:
        vae, x = family.parts["vae"], batch.pixels
        trained = next(vae.encoder.parameters()).requires_grad
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            latents, kl = self.encoded(vae, x, seed, batch.positions)
        decoded = vae.decode(latents)
        drawn = decoded.sample.float()
        regularizer = self.kl * kl + self.commitment * decoded.get("commit_loss", 0.0) if trained else 0.0
        covered = torch.ones(len(x), device=x.device)
        if batch.mask is not None:          # what does not count is drawn right
            mask = batch.mask.repeat_interleave(x.shape[2] // batch.mask.shape[2], 2).repeat_interleave(
                x.shape[3] // batch.mask.shape[3], 3)
            drawn, covered = torch.lerp(x, drawn, mask), mask.mean(dim=(1, 2, 3))
        # A crop may hold nothing of its mask: it counts nothing.
        per_example = self.distance(drawn, x) / covered.clamp(min=1e-6) + regularizer
        cost = per_example
        if self.adversary and torch.is_grad_enabled():
            cost = cost + self.adversary(drawn, x, per_example, batch.positions[0])
        return Losses((batch.weight * cost).sum() * batch.share, per_example.detach(),
                      torch.zeros(len(x), device=x.device))

    def encoded(self, vae, x: Tensor, seed: int, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Latents of the VAE's own scale and, (B,), their KL for each number of the picture, as LDM's factor wants it; of a
        VQ the latents before the codebook, and 0."""
        with device.exact(x):       # latents are those that a denoiser is trained and sampled with: families/_latents.py
            found = vae.encode(x.to(vae.dtype))
        if "latents" in found:
            return found.latents, torch.zeros(len(x), device=x.device)
        posterior = found.latent_dist
        latents = posterior.mode()
        if self.sample:
            latents = latents + posterior.std * noise.normal(latents.shape[1:], seed, positions, "posterior").to(latents)
        return latents, posterior.kl().float() / x[0].numel()

    def distance(self, drawn: Tensor, x: Tensor) -> Tensor:
        """(B,) what each picture's errors cost."""
        error = drawn - x
        cost = (error.abs() if self.pixels == "l1" else error.square()).mean(dim=(1, 2, 3))
        if self.ssim:
            cost = cost + self.ssim * (1 - similarity.ssim(drawn, x))
        if self.gradient:
            cost = cost + self.gradient * similarity.gradient(error)
        if self.lpips:
            weight, network = self.lpips
            cost = cost + weight * network.to(x.device)(drawn, x).flatten()
        return cost


def build(pixels: str, ssim: float, gradient: float, lpips: float, sample: bool, kl: float, commitment: float,
          step_size: int, adversarial: dict | None = None) -> Decode:
    """The fields of the recipe, without those that are null; `step_size` is the number of examples of a step."""
    judge = adversarial and Adversary(adversarial["weight"], adversarial["start"] * step_size, adversary.network())
    return Decode(pixels, ssim, gradient, (lpips, similarity.lpips()) if lpips else None, sample, kl, commitment, judge)
