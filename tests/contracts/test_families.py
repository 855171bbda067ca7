"""What every family promises, on the tiny base: it calls the model exactly as the diffusers pipeline does."""

import pytest
import torch
from diffusers import DDIMScheduler

from finetune import registry
from finetune.data import encode
from finetune.data.loader import Encoded, Loader, View
from finetune.data.scan import scan
from finetune.errors import FinetuneError
from finetune.objectives.denoise import build


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


def test_pixels_survive_the_vae(family, pictures):
    loader = Loader(scan(str(pictures), "{text}"), View(64, False, False, "{text}", 0.0), 0)
    pixels = loader.batch([0, 1]).pixels
    moments = family.moments(pixels)
    latents = family.latents(moments, torch.zeros(2, 4, 16, 16))
    assert latents.shape == (2, 4, 64 // family.stride, 64 // family.stride)
    assert (family.decode_latents(latents) - pixels).square().mean() < 0.05     # pictures unlike its world
    assert 0.3 < latents.std() < 3          # scaled as the denoiser wants them


def test_cached_and_uncached_losses_agree(family, pictures):
    view, examples = View(32, False, True, "{text}", 0.3), scan(str(pictures), "{text}")
    objective = build(timesteps="uniform", weighting_kind="min_snr", gamma=5.0)
    encoded = Encoded(encode.pictures(examples, view, family.moments, quiet=True),
                      encode.texts(examples, view, family.encode_text), family.latents)
    cached, plain = Loader(examples, view, 3, encoded), Loader(examples, view, 3)
    with torch.no_grad():
        for positions in ([0, 1, 2], [12, 13, 14]):
            one, other = (objective(family, loader.batch(positions), 3) for loader in (cached, plain))
            torch.testing.assert_close(one.per_example, other.per_example, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_formula(family, pictures):
    """Against DDPM's forward process and min-SNR, written out in float64 with diffusers' own noise schedule."""
    from diffusers import DDPMScheduler

    loader = Loader(scan(str(pictures), "{text}"), View(32, False, False, "{text}", 0.0), 0)
    batch, seen = loader.batch([0, 1, 2]), {}
    real = family.denoise

    def spy(x, t, conditioning, geometry):
        seen.update(x=x, t=t, out=real(x, t, conditioning, geometry))
        return seen["out"]

    family.denoise = spy
    with torch.no_grad():
        losses = build(timesteps="uniform", weighting_kind="min_snr", gamma=5.0)(family, batch, 0)
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
