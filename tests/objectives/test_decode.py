"""The loss of an autoencoder: its terms, on a KL and a VQ model."""

import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from finetune.batch import Batch
from finetune.errors import FinetuneError
from finetune.methods import vae_decoder
from finetune.objectives import _similarity as similarity
from finetune.objectives import decode
from finetune.recipe import schema

SHAPE = {"block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 8, "latent_channels": 3}
MODELS = {"kl": lambda: AutoencoderKL(**SHAPE), "vq": lambda: VQModel(**SHAPE, num_vq_embeddings=32)}
WORDS = {"pixels": "l1", "ssim": 0.0, "gradient": 0.0, "lpips": 0.0, "sample": True, "kl": 1e-6, "commitment": 1.0,
         "step_size": 2}


def family(model: str, encoder: bool = False):
    torch.manual_seed(0)
    vae = MODELS[model]().requires_grad_(False)
    found = SimpleNamespace(parts={"vae": vae}, spec=SimpleNamespace(name="sd1"))
    method = vae_decoder.build(schema.VaeDecoder(kind="vae_decoder", encoder=encoder), 0)
    method.install(found)
    return found, method


def batch(first: int = 0, count: int = 2, mask=None) -> Batch:
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch([*range(first, first + count)], [""] * count, torch.ones(count), 1 / count, torch.zeros(count, 6),
                 pixels[first:first + count], mask=mask)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("encoder", [False, True])
def test_what_is_trained_and_nothing_else_gets_a_gradient(model, encoder):
    found, method = family(model, encoder)
    decode.build(**WORDS)(found, batch(), 0).loss.backward()
    trained = {name for name, p in found.parts["vae"].named_parameters() if p.grad is not None}
    assert {f"vae.{name}" for name in trained} == set(method.parameters())
    assert any(name.startswith("encoder.") for name in trained) == encoder
    assert ("quantize.embedding.weight" in trained) == (encoder and model == "vq")


@pytest.mark.parametrize("model", MODELS)
def test_a_few_steps_draw_better(model):
    found, method = family(model, True)
    objective, optimizer = decode.build(**WORDS | {"ssim": 0.2, "gradient": 0.5}), torch.optim.AdamW(method.groups(3e-3))
    losses = []
    for _ in range(15):
        loss = objective(found, batch(), 0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_loss_of_a_batch_is_that_of_its_halves():
    found, _ = family("kl")
    objective = decode.build(**WORDS | {"ssim": 0.2, "gradient": 0.5})
    whole = objective(found, batch(0, 4), 3)
    halves = [objective(found, batch(first, 2), 3) for first in (0, 2)]
    assert torch.allclose(whole.per_example, torch.cat([half.per_example for half in halves]), rtol=1e-5)
    assert torch.allclose(whole.loss, sum(half.loss for half in halves) / 2, rtol=1e-5)


def test_the_regularizer_counts_when_the_encoder_is_trained():
    for encoder in (False, True):
        found, _ = family("kl", encoder)
        without, with_kl = (decode.build(**WORDS | {"kl": kl})(found, batch(), 0).loss for kl in (0.0, 1.0))
        assert (with_kl > without) == encoder


def test_what_the_mask_leaves_out_costs_nothing():
    found, _ = family("kl")
    mask = torch.ones(2, 1, 8, 8)
    mask[..., 4:] = 0
    words = WORDS | {"sample": False}
    half = decode.build(**words)(found, batch(mask=mask), 0).per_example
    with torch.no_grad():
        x = batch().pixels
        error = (found.parts["vae"](x).sample - x).abs()[..., :8].mean(dim=(1, 2, 3))
    assert torch.allclose(half, error, rtol=1e-5)


def test_a_crop_without_any_of_its_mask_costs_nothing_and_its_neighbour_what_it_did():
    found, _ = family("kl")
    mask = torch.ones(2, 1, 8, 8)
    objective = decode.build(**WORDS)
    whole = objective(found, batch(mask=mask), 0).per_example
    mask[0] = 0
    result = objective(found, batch(mask=mask), 0)
    assert torch.equal(result.per_example, torch.stack([torch.tensor(0.0), whole[1]]))
    result.loss.backward()
    assert all(p.grad.isfinite().all() for p in found.parts["vae"].decoder.parameters())


def test_latents_are_exact_whatever_the_precision_that_the_decoder_is_trained_in():
    found, _ = family("kl")
    objective = decode.build(**WORDS | {"sample": False})
    plain, _ = objective.encoded(found.parts["vae"], batch().pixels, 0, [0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.encoded(found.parts["vae"], batch().pixels, 0, [0, 1])[0], plain)


def judged(start: int = 0):
    """A family of which a whole VAE is trained, and an objective with an adversary."""
    found, method = family("kl", True)
    return found, method, decode.build(**WORDS | {"adversarial": {"weight": 0.5, "start": start}})


def gradients(module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return found


def test_an_adversary_s_gradient_of_a_batch_is_that_of_its_halves():
    found, _, objective = judged()
    both = torch.nn.ModuleList([found.parts["vae"], objective.networks["discriminator"]])
    objective(found, batch(0, 4), 3).loss.backward()
    whole = gradients(both)
    for first in (0, 2):
        (objective(found, batch(first, 2), 3).loss / 2).backward()
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(gradients(both), whole))


def test_an_adversary_pulls_at_a_drawing_with_its_share_of_the_other_terms_and_learns_from_neither():
    _, _, objective = judged(start=3)
    network, x = objective.networks["discriminator"], batch(0, 4).pixels
    hinges = []
    for position in (0, 6):     # before the start, which is 3 steps of 2 examples, and from it on
        drawn = (0.9 * x).requires_grad_()
        cost = (drawn - x).abs().mean(dim=(1, 2, 3))
        objective.adversary(drawn, x, cost, position).sum().backward()
        own, = torch.autograd.grad(cost.sum(), drawn)
        pulled = torch.zeros(4) if drawn.grad is None else drawn.grad.flatten(1).norm(dim=1)
        assert torch.allclose(pulled, own.flatten(1).norm(dim=1) * (0.5 if position else 0.0), rtol=1e-4)
        hinges.append(gradients(network))
    assert all(torch.equal(a, b) for a, b in zip(*hinges)) and sum(g.norm() for g in hinges[0]) > 0


def test_a_discriminator_learns_to_tell_and_a_decoder_that_listens_draws_otherwise():
    drawings = []
    for start in (0, 100):
        found, method, objective = judged(start)
        groups = [*method.groups(1e-3), {"params": objective.networks["discriminator"].parameters(), "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups)
        hinges = []
        for _ in range(8):
            result = objective(found, batch(), 0)
            result.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            hinges.append((result.loss - result.per_example.mean()).item())
        drawings.append(found.parts["vae"](batch().pixels).sample)
    assert hinges[-1] < 0.7 * hinges[0]     # of the last, where it learns alone
    assert not torch.allclose(*drawings, atol=1e-3)
    with torch.no_grad():       # held-out pictures are measured by the other terms
        result = objective(found, batch(), 0)
    assert torch.equal(result.loss, result.per_example.mean())


def test_ssim_is_one_of_equal_pictures_and_less_of_others():
    x = batch(0, 4).pixels
    assert torch.allclose(similarity.ssim(x, x), torch.ones(4))
    assert (similarity.ssim(x, x.flip(3)) < 0.5).all()
    # Two even pictures: what is left of eq. 13 is the comparison of their means.
    a, b, c1 = 0.5, 0.25, (0.01 * 2) ** 2
    even = [torch.full((1, 3, 16, 16), value) for value in (a, b)]
    assert similarity.ssim(*even).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-4)


def test_psnr_is_that_of_the_range():
    x = torch.zeros(1, 3, 8, 8)
    assert similarity.psnr(x, x + 0.2).item() == pytest.approx(20.0)       # 0.1 of the range


@pytest.mark.parametrize("wrong, said", [
    (ImportError("No module named 'torchvision'"), r"No module named 'torchvision'\n    pip install 'finetune\[lpips\]'"),
    (RuntimeError("torchvision::nms does not exist"), f"nms does not exist(.|\n)*built for torch {torch.__version__[:4]}"),
    (URLError("no route"), "its network cannot be fetched: .*no route")], ids=["missing", "of another torch", "offline"])
def test_an_lpips_that_cannot_be_had_says_why_and_what_to_do(monkeypatch, wrong, said):
    def network(**_):
        raise wrong

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=network))
    with pytest.raises(FinetuneError, match=said):
        decode.build(**WORDS | {"lpips": 0.1})
