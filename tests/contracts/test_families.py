"""What every family promises, on the tiny base: it calls the model exactly as the diffusers pipeline does."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from finetune import registry
from finetune.data import encode
from finetune.data.loader import Encoded
from finetune.diffusion.weights import weighting
from finetune.errors import FinetuneError
from finetune.objectives.denoise import Denoise


@pytest.fixture(scope="module")
def family():
    return registry.find("families", "sd1").load("tiny")


def test_text_is_what_the_pipeline_encodes(family):
    captions = ["a red circle on white", ""]
    embeds, _ = family.pipeline().encode_prompt(captions, "cpu", 1, False)
    assert torch.equal(family.encode_text(captions).tokens, embeds)


def test_sampling_by_hand_is_what_the_pipeline_samples(family):
    pipe = family.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    captions = ["a red circle on white", "a blue star on navy"]
    theirs = pipe(captions, latents=x, guidance_scale=1.0, num_inference_steps=5, output_type="latent").images
    with torch.no_grad():
        told = family.encode_text(captions)
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(family.denoise(x, t.expand(2), told, torch.zeros(2, 6)), t, x).prev_sample
    assert (x - theirs).norm() <= 1e-5 * theirs.norm()


def test_pixels_survive_the_vae(family, pictures, streamed):
    pixels = streamed(pictures, 64).batch({0: 0, 1: 1}, 1.0).pixels
    moments = family.moments(pixels)
    latents = family.latents(moments, torch.zeros(2, 4, 16, 16))
    assert latents.shape == (2, 4, 64 // family.stride, 64 // family.stride)
    assert (family.decode_latents(latents) - pixels).square().mean() < 0.05     # pictures unlike its world
    assert 0.3 < latents.std() < 3          # scaled as the denoiser wants them


def test_cached_and_uncached_losses_agree(family, pictures, streamed):
    seen = dict(flip=True, dropout=0.3, stride=family.stride, seed=3)
    plain = streamed(pictures, 32, **seen)
    objective = Denoise(weight=weighting("min_snr", gamma=5.0))
    encoded = Encoded(encode.pictures(plain.index, plain.sizes, plain.view, family.moments, quiet=True),
                      encode.texts([(plain.index, plain.captions)], family.encode_text, family.cut_text), family.latents)
    cached = streamed(pictures, 32, encoded=encoded, **seen)
    with torch.no_grad():
        for step in (0, 3):
            one, other = (objective(family, s.batch(s.positions(step, range(4)), 0.25), 3) for s in (cached, plain))
            torch.testing.assert_close(one.per_example, other.per_example, rtol=1e-4, atol=1e-6)
            assert torch.allclose(one.loss, other.loss, rtol=1e-4)


def test_a_mask_and_weights_decide_what_counts(family, pictures, streamed):
    """Against the mean over the mask, written out; what the mask leaves out has no gradient."""
    batch = streamed(pictures, 32, stride=family.stride).batch({5: 0, 9: 1}, 0.5)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :3] = 1
    plain = Denoise()
    real, error = family.denoise, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = []
    family.denoise = lambda x, *rest: target.append(x) or torch.zeros_like(x)
    zero = plain(family, batch, 0)
    family.denoise = lambda x, *rest: error
    losses = plain(family, replace(batch, mask=mask, weight=torch.tensor([1.0, 0.5])), 0)
    del family.denoise
    epsilon = draw(batch, "noise")
    wanted = (error - epsilon).square()[..., :3].mean((1, 2, 3))
    assert torch.allclose(losses.per_example, wanted, rtol=1e-5)
    assert torch.allclose(losses.loss, 0.5 * (wanted[0] + 0.5 * wanted[1]), rtol=1e-5)
    losses.loss.backward()
    assert error.grad[..., :3].all() and not error.grad[..., 3:].any() and torch.isfinite(zero.loss)


def test_the_loss_is_the_formula(family, pictures, streamed):
    """Against DDPM's forward process and min-SNR, written out in float64 with diffusers' own noise schedule."""
    from diffusers import DDPMScheduler

    batch, seen = streamed(pictures, 32, stride=family.stride).batch({0: 0, 1: 1, 2: 2}, 1 / 3), {}
    real = family.denoise

    def spy(x, t, conditioning, geometry):
        seen.update(x=x, t=t, out=real(x, t, conditioning, geometry))
        return seen["out"]

    family.denoise = spy
    with torch.no_grad():
        losses = Denoise(weight=weighting("min_snr", gamma=5.0))(family, batch, 0)
    del family.denoise
    alpha = DDPMScheduler.from_config(family.scheduler.config).alphas_cumprod.double()[seen["t"]]
    x0 = family.latents(family.moments(batch.pixels), draw(batch, "posterior"))
    noise = (seen["x"].double() - alpha.sqrt().view(-1, 1, 1, 1) * x0) / (1 - alpha).sqrt().view(-1, 1, 1, 1)
    snr = alpha / (1 - alpha)
    error = (seen["out"].double() - noise).square().mean((1, 2, 3))
    expected = (error * snr.clamp(max=5) / snr).mean()
    assert abs(losses.loss.item() - expected.item()) < 1e-4 * expected.item()


def draw(batch, stream):
    from finetune.diffusion import noise

    return noise.normal((4, 8, 8), 0, batch.positions, stream)


def test_a_caption_that_would_be_cut_is_an_error(family):
    with pytest.raises(FinetuneError, match="would lose"):
        family.encode_text(["red " * 80])
    family.encode_text(["red " * 75])
