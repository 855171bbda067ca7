"""train.lean: frozen layers keep less and give the same, bit for bit where it is said and but for rounding where not."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import nn

from finetune.errors import FinetuneError
from finetune.train import lean


def both(layer: nn.Module, x: torch.Tensor, **kept) -> tuple:
    """(output, gradient of x, numbers that were kept beside the layer's own) of torch's layer and of ours."""
    own, found = {t.untyped_storage().data_ptr() for t in layer.parameters()}, []
    gradient = torch.randn_like(layer(x)).detach()
    for context in (torch.enable_grad, lean.lean):
        count, x = {}, x.detach().clone().requires_grad_()

        def keep(t: torch.Tensor) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in own:
                count[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
            return t

        with context():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                y = layer(x * 1)
            y.backward(gradient)
        found.append((y.detach(), x.grad, sum(count.values())))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(64, 64, 3, padding=1), (2, 64, 24, 24)), (nn.Conv2d(64, 96, 3, 2, 1), (1, 64, 40, 40)),
    (nn.Conv2d(128, 256, 1, bias=False), (1, 128, 32, 32)), (nn.Conv2d(64, 64, 3, padding=1, groups=2), (2, 64, 32, 32))])
def test_a_convolution_without_its_input_is_the_same_bit_for_bit(layer, shape, dtype):
    (y, dx, kept), (our_y, our_dx, ours) = both(layer.requires_grad_(False).to(dtype), torch.randn(shape).to(dtype))
    assert torch.equal(y, our_y) and torch.equal(dx, our_dx)
    assert kept == torch.Size(shape).numel() and ours == 0


def test_a_gate_that_is_made_again_is_the_same_bit_for_bit():
    (y, dx, kept), (our_y, our_dx, ours) = both(GEGLU(32, 128).requires_grad_(False), torch.randn(2, 50, 32))
    assert torch.equal(y, our_y) and torch.equal(dx, our_dx)
    assert kept == 2 * 50 * 3 * 128 and ours == 2 * 50 * 2 * 128


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(640, 640), (2, 30, 640)), (nn.Linear(512, 1024, bias=False), (7, 512)),
    (nn.Conv2d(256, 256, 3, padding=1), (1, 256, 6, 5)), (nn.Conv2d(256, 192, 3, 2, (1, 0), bias=False), (2, 256, 6, 7)),
    (nn.Conv2d(640, 640, 1), (3, 640, 4, 4))])
def test_a_product_by_onednn_is_the_same_but_for_rounding(layer, shape):
    (y, dx, _), (our_y, our_dx, ours) = both(layer.requires_grad_(False), torch.randn(shape))
    torch.testing.assert_close(our_y, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_dx, dx, rtol=1e-4, atol=1e-5)
    assert ours == 0 and not (torch.equal(y, our_y) and torch.equal(dx, our_dx))      # else it was not ours


def test_what_is_trained_is_left_to_torch_and_so_is_what_passes_no_gradient():
    linear, conv = nn.Linear(640, 640), nn.Conv2d(256, 256, 3, padding=1)
    frozen, x = nn.Linear(640, 640).requires_grad_(False), torch.randn(4, 640)
    plain = frozen(x)
    with lean.lean():
        assert torch.equal(frozen(x), plain)
        with torch.no_grad():
            assert torch.equal(frozen(x.clone().requires_grad_()), plain)
        linear(torch.randn(4, 640)).sum().backward()
        conv(torch.randn(1, 256, 4, 4)).sum().backward()
    assert linear.weight.grad.any() and conv.weight.grad.any() and conv.bias.grad.any()
    assert F.linear is lean.LINEAR and F.conv2d is lean.CONV2D and GEGLU.forward is lean.GATED


def test_the_plan_knows_what_is_not_kept(recipe):
    from finetune.recipe import load
    from finetune.train.plan import needs

    less, more = (needs(load(recipe, [f"train.lean={word}"]).recipe).phases["training"] for word in ("true", "false"))
    assert less < more == needs(load(recipe, ["train.compile=true"]).recipe).phases["training"]
    with pytest.raises(FinetuneError, match="train.lean: what is compiled decides by itself"):
        load(recipe, ["train.compile=true", "train.lean=true"])


@pytest.mark.gpu
def test_on_a_gpu_too():
    layer = nn.Conv2d(320, 320, 3, padding=1).requires_grad_(False).cuda()
    (y, dx, kept), (our_y, our_dx, ours) = both(layer, torch.randn(2, 320, 32, 32, device="cuda"))
    assert torch.equal(y, our_y) and torch.equal(dx, our_dx) and kept and not ours
