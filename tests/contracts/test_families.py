"""What every family promises, on the tiny base and a narrow member of each: it calls the model exactly as diffusers does."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from finetune import registry, tokens
from finetune.batch import Conditioning
from finetune.data import beside, encode
from finetune.data.loader import Encoded
from finetune.diffusion import noise
from finetune.diffusion.weights import weighting
from finetune.errors import FinetuneError
from finetune.families._source import kind_of, locate
from finetune.objectives.denoise import Denoise

MEMBERS = ["tiny", "sd15", "sd21-base", "sd21", "sdxl", "sd3-medium", "sd35-medium", "x4-upscaler"]
CAPTIONS = ["a red circle on white", "a blue star on navy"]
LONG = " ".join(["red", "blue", "green"][n * n % 7 % 3] for n in range(100))


@pytest.fixture(scope="module", params=MEMBERS)
def family(request, member):
    path = request.param if request.param == "tiny" else str(member(request.param))
    return registry.find("families", kind_of(locate(path))).load(path)


@pytest.fixture(scope="module")
def size(family) -> int:
    """Of pictures that its UNet can halve three times."""
    return 32 if family.source.name == "tiny" else 64


@pytest.fixture
def own(family):
    """The family, which a test may change."""
    yield family
    for name in ("long", "denoise"):
        family.__dict__.pop(name, None)


def channels(family) -> int:
    return family.parts["vae"].config.latent_channels


def seen(family) -> dict:
    """How the data room has to see pictures for it."""
    return {"stride": family.stride, "shows": family.shows}


def shown(family, conditioning, beside=None, level=20):
    """Also what an upscaler is shown."""
    return conditioning if family.shows is None else replace(
        conditioning, beside=beside, level=torch.full((len(beside),), level))


def draw(family, batch, stream, size):
    return noise.normal((channels(family), size // family.stride, size // family.stride), 0, batch.positions, stream)


def told(family, prompts):
    """What the pipeline makes of prompts, and of no negative prompt."""
    more = {"prompt_2": None, "prompt_3": None} if family.spec.name == "sd3" else {}
    found = family.pipeline().encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
                                            **more)
    return (Conditioning(found[0], *found[2:3]), Conditioning(found[1], *found[3:])) if len(found) == 4 else \
        map(Conditioning, found)


def test_every_family_has_a_member(member):
    known = {kind_of(locate(name if name == "tiny" else str(member(name)))) for name in MEMBERS}
    assert known == {name for name in registry.names("families")}


def test_text_is_what_the_pipeline_encodes(family):
    with torch.no_grad():
        mine, nothing = family.encode_text(CAPTIONS), family.encode_text(["", ""])
    for ours, theirs in zip((mine, nothing), told(family, CAPTIONS)):
        assert torch.equal(ours.tokens, theirs.tokens) and ours.mask is None
        assert ours.pooled is theirs.pooled is None or torch.equal(ours.pooled, theirs.pooled)
    assert (nothing.tokens == 0).all() == (family.spec.name == "sdxl")


def test_a_call_of_the_network_is_that_of_the_pipeline(family, monkeypatch):
    """A whole sampling run, with guidance, in a size of its own: each call of the UNet, and what comes out."""
    pipe, calls, real = family.pipeline(), [], family.parts["denoiser"].forward
    flow = family.path.prediction == "flow"
    pipe.scheduler = pipe.scheduler if flow else DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def spy(*given, **named):
        out = real(*given, **named)
        calls.append((*(given or (named["hidden_states"], named["timestep"])), out[0]))
        assert named.get("class_labels", torch.tensor(20)).eq(20).all()
        return out

    step = family.stride
    x = torch.randn(2, channels(family), 8, 16, generator=torch.Generator().manual_seed(0))
    sizes = {"original_size": (900, 700), "crops_coords_top_left": (3, 5), "target_size": (512, 640)}
    more = {"height": 8 * step, "width": 16 * step} | (sizes if family.spec.name == "sdxl" else {})
    if family.shows:
        more = {"image": torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(1)), "noise_level": 20}
    monkeypatch.setattr(family.parts["denoiser"], "forward", spy)
    theirs = pipe(CAPTIONS, latents=x, guidance_scale=3.0, num_inference_steps=3, output_type="latent",
                  **more).images
    monkeypatch.undo()
    pipe.scheduler.set_timesteps(3)
    geometry = torch.tensor([[900, 700, 3, 5, 512, 640]] * 4)
    with torch.no_grad():
        conditioning = family.encode_text(["", "", *CAPTIONS])
        for (sample, t, wanted), now in zip(calls, pipe.scheduler.timesteps, strict=True):
            width = channels(family)
            sample, conditioning = sample[:, :width], shown(family, conditioning, sample[:, width:])
            found = family.denoise(sample, t.expand(4), conditioning, geometry)
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
            without, guided = family.denoise(torch.cat([x, x]), now.expand(4), conditioning, geometry).chunk(2)
            x = pipe.scheduler.step(without + 3 * (guided - without), now, x).prev_sample
    assert (x - theirs).norm() <= 1e-5 * theirs.norm()
    if family.spec.name == "sdxl":
        assert not torch.allclose(family.denoise(sample, t.expand(4), conditioning, geometry + 1), found, rtol=1e-6)


def test_pixels_survive_the_vae(family, pictures, streamed, size):
    pixels = streamed(pictures, 64).batch({0: 0, 1: 1}, 1.0).pixels
    moments, side = family.moments(pixels), 64 // family.stride
    latents = family.latents(moments, torch.zeros(2, channels(family), side, side))
    assert latents.shape == (2, channels(family), side, side)
    vae, config = family.parts["vae"], family.parts["vae"].config
    mode, shift = vae.encode(pixels).latent_dist.mode(), config.shift_factor or 0.0
    assert torch.equal(latents, (mode - shift) * config.scaling_factor) and bool(shift) == (family.spec.name == "sd3")
    drawn = vae.decode(latents / config.scaling_factor + shift).sample
    if family.source.name == "tiny":        # the others' weights are random
        assert (drawn - pixels).square().mean() < 0.05      # pictures unlike its world
        assert 0.3 < latents.std() < 3      # scaled as the denoiser wants them


def test_cached_and_uncached_losses_agree(family, pictures, streamed, size):
    how = dict(flip=True, dropout=0.3, seed=3, **seen(family))
    plain = streamed(pictures, size, **how)
    objective = Denoise(weight=weighting("min_snr", gamma=5.0))
    encoded = Encoded(encode.pictures(plain.index, plain.sizes, plain.view, family.moments, quiet=True),
                      encode.texts([(plain.index, plain.captions)], family.encode_text, family.cut_text), family.latents)
    cached = streamed(pictures, size, encoded=encoded, **how)
    with torch.no_grad():
        for step in (0, 3):
            one, other = (objective(family, s.batch(s.positions(step, range(4)), 0.25), 3) for s in (cached, plain))
            torch.testing.assert_close(one.per_example, other.per_example, rtol=1e-4, atol=1e-6)
            assert torch.allclose(one.loss, other.loss, rtol=1e-4)


def test_a_mask_and_weights_decide_what_counts(own, pictures, streamed, size):
    """Against the mean over the mask, written out; what the mask leaves out has no gradient."""
    batch, side = streamed(pictures, size, **seen(own)).batch({5: 0, 9: 1}, 0.5), size // own.stride
    mask = torch.zeros(2, 1, side, side)
    mask[..., :3] = 1
    error = torch.randn(2, channels(own), side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    own.denoise = lambda x, *rest: torch.zeros_like(x)
    zero = Denoise()(own, batch, 0)
    own.denoise = lambda x, *rest: error
    losses = Denoise()(own, replace(batch, mask=mask, weight=torch.tensor([1.0, 0.5])), 0)
    a, b = ((k.float().view(-1, 1, 1, 1)) for k in own.path.coefficients(losses.timesteps)[:2])
    epsilon, x0 = draw(own, batch, "noise", size), own.latents(own.moments(batch.pixels), draw(own, batch, "posterior", size))
    target = {"epsilon": epsilon, "v_prediction": a * epsilon - b * x0, "flow": epsilon - x0}[own.path.prediction]
    wanted = (error - target).square()[..., :3].mean((1, 2, 3))
    assert torch.allclose(losses.per_example, wanted, rtol=1e-5)
    assert torch.allclose(losses.loss, 0.5 * (wanted[0] + 0.5 * wanted[1]), rtol=1e-5)
    losses.loss.backward()
    assert error.grad[..., :3].all() and not error.grad[..., 3:].any() and torch.isfinite(zero.loss)


def test_the_loss_is_the_formula(own, pictures, streamed, size):
    """Against DDPM's forward process and min-SNR, written out in float64 with diffusers' own noise schedule."""
    batch, call, real = streamed(pictures, size, **seen(own)).batch({0: 0, 1: 1, 2: 2}, 1 / 3), {}, own.denoise

    def spy(x, t, conditioning, geometry):
        call.update(x=x, t=t, out=real(x, t, conditioning, geometry), geometry=geometry)
        return call["out"]

    own.denoise = spy
    with torch.no_grad():
        losses = Denoise(weight=weighting("min_snr", gamma=5.0))(own, batch, 0)
    x0 = own.latents(own.moments(batch.pixels), draw(own, batch, "posterior", size)).double()
    if flow := own.path.prediction == "flow":
        sigma = call["t"].double() / 1000
        assert own.path.shift == 3 and torch.allclose(losses.timesteps.float() * 1000, call["t"])
        a, b = (1 - sigma).view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    else:
        alpha = DDPMScheduler.from_config(own.scheduler.config).alphas_cumprod.double()[call["t"]].view(-1, 1, 1, 1)
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
    epsilon = (call["x"].double() - a * x0) / b
    snr = (a / b).square().flatten()
    v = own.path.prediction == "v_prediction"
    target = epsilon - x0 if flow else a * epsilon - b * x0 if v else epsilon
    error = (call["out"].double() - target).square().mean((1, 2, 3))
    # an error e of eps − x0 is one of b·e of x0
    expected = (error * snr.clamp(max=5) * (b.flatten().square() if flow else 1 / (snr + v))).mean()
    assert abs(losses.loss.item() - expected.item()) < 1e-4 * expected.item()
    assert call["geometry"].tolist()[0] == [36, 40, 0, round((40 * size / 36 - size) / 2), size, size]


def test_a_caption_that_would_be_cut_is_an_error(family):
    room = 255 if "text_3" in family.parts else 75
    with pytest.raises(FinetuneError, match="would lose"):
        family.encode_text(["red " * (room + 5)])
    family.encode_text(["red " * room])


@torch.no_grad()
def test_long_captions_are_pieces_that_a_shorter_neighbour_does_not_feel(own):
    if own.spec.name == "sd3":
        with pytest.raises(FinetuneError, match="chunk is not for sd3"):
            own.long = "chunk"
        told_to_all = " ".join(["red"] * (100 if "text_3" in own.parts else 75))      # the CLIPs take the beginning, T5 all
        assert torch.equal(own.encode_text([told_to_all]).tokens, told(own, [told_to_all])[0].tokens)
        own.long = "truncate"
        assert torch.equal(own.encode_text(["red " * 256]).tokens, told(own, ["red " * 256])[0].tokens)
        own.long = "error"
        return
    own.long = "chunk"
    both = own.encode_text([LONG, CAPTIONS[0]])
    first, second = (own.encode_text([" ".join(words)]) for words in (LONG.split()[:75], LONG.split()[75:]))
    torch.testing.assert_close(both.tokens[:1], torch.cat([first.tokens, second.tokens], 1), rtol=0, atol=1e-5)
    if both.pooled is not None:
        torch.testing.assert_close(both.pooled[:1], first.pooled, rtol=0, atol=1e-5)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 600])
    where = torch.zeros(2, 6)
    if own.shows == "small":        # refused in training: diffusers has no mask for layers without self-attention
        return
    alone = own.denoise(x[1:], t[1:], own.encode_text([CAPTIONS[0]]), where[1:])
    torch.testing.assert_close(own.denoise(x, t, both, where)[1:], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_learned_token_leaves_the_end_where_it_is(own):
    """Its rows are those of words that are there, so that all states are what these words give, the pooled too."""
    words, parts = own.tokenizers["text"]("red circle", add_special_tokens=False).input_ids, tokens.text_parts(own)
    plain = own.encode_text(["a red circle on white", "red circle"])
    rows = {part: own.parts[part].get_input_embeddings().weight[words].clone() for part in parts}
    with tokens.added(own, {"zkw": rows}):
        said = own.encode_text(["a zkw on white", "zkw"])
    assert torch.equal(said.tokens[:, :77], plain.tokens[:, :77])
    assert plain.pooled is None or torch.equal(said.pooled, plain.pooled)
    assert own.learned is None and "zkw" not in own.tokenizers[parts[-1]].get_vocab()


def test_an_inpainting_network_is_called_as_the_pipeline_does(member, monkeypatch):
    family = registry.find("families", "sd1").load(str(member("sd15-inpainting")))
    pipe, calls, unet = family.pipeline(), [], family.parts["denoiser"]
    pipe.set_progress_bar_config(disable=True)
    real = unet.forward

    def spy(sample, timestep, **rest):
        calls.append((sample, timestep, real(sample, timestep, **rest)[0]))
        return calls[-1][2:]

    monkeypatch.setattr(unet, "forward", spy)
    hole = beside.random_hole(64, 64, 0, 3)[None]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # Its VAE draws from the posterior: here what training draws.
    drawn = noise.normal((4, 8, 8), 0, [3], "posterior beside")
    monkeypatch.setattr(pipe, "_encode_vae_image", lambda image, generator: family.latents(family.moments(image), drawn))
    pipe(CAPTIONS[0], image=image, mask_image=hole, num_inference_steps=1, guidance_scale=1.0, height=64, width=64)
    monkeypatch.undo()
    sample, t, wanted = calls[0]
    assert sample.shape[1] == 9 and torch.equal(sample[:, 4:5], hole[..., ::8, ::8])
    told = family.beside(beside.without(image[0], hole[0])[None], 0, [3])
    torch.testing.assert_close(told["beside"], sample[:, 4:], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        told = replace(family.encode_text(CAPTIONS[:1]), **told)
        found = family.denoise(sample[:, :4], t.expand(1), told, torch.zeros(1, 6))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_an_upscaler_sees_a_small_picture_with_the_noise_that_it_is_told(member):
    """Against the noising of the original, written out in float64 (ImageConcatWithNoiseAugmentation)."""
    family = registry.find("families", "upscaler").load(str(member("x4-upscaler")))
    pixels, positions = torch.rand(3, 32, 32) * 2 - 1, list(range(400))
    small = beside.small(pixels, family.stride)
    torch.testing.assert_close(small, pixels.unflatten(2, (8, 4)).unflatten(1, (8, 4)).mean((2, 4)))
    told = family.beside(small.expand(400, 3, 8, 8), 7, positions)
    level = told["level"]
    assert 0 <= level.min() < 10 and 340 < level.max() < 350 and 165 < level.double().mean() < 185
    betas = torch.linspace(0.0001 ** 0.5, 0.02 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[level].view(-1, 1, 1, 1)
    wanted = alpha.sqrt() * small + (1 - alpha).sqrt() * noise.normal((3, 8, 8), 7, positions, "noise beside")
    torch.testing.assert_close(told["beside"].double(), wanted, rtol=1e-5, atol=1e-5)
    again = family.beside(small.expand(2, 3, 8, 8), 7, [9, 250])
    assert torch.equal(again["beside"], told["beside"][[9, 250]]) and torch.equal(again["level"], level[[9, 250]])


def test_an_inpainting_model_is_not_trained_without_masks(member, recipe, train, tmp_path, capsys):
    assert train(recipe, tmp_path / "run", "--set", f"base.path={member('sd15-inpainting')}") == 2
    assert "add data.inpaint: {masks: random}" in capsys.readouterr().err
    assert train(recipe, tmp_path / "run", "--set", "data.inpaint={}") == 2
    assert "data.inpaint: is for inpainting models" in capsys.readouterr().err


def test_a_path_of_the_recipe_is_what_the_header_says(recipe, train, tmp_path, capsys):
    own = "objective.path={kind: ddpm, schedule: cosine, prediction: v_prediction, zero_snr: true}"
    assert train(recipe, tmp_path / "run", "--set", own, "--set", "train.max_steps=2") == 0
    assert "(sd1, v_prediction, zero terminal SNR, float32)" in capsys.readouterr().err
