"""Frozen layers in a training step, without what only their own gradients would need: `train.lean`.

torch keeps the input of a convolution for the gradient of a weight that is not trained (Bhatia & Dangel 2024), and of a
GEGLU the GELU, which is quickly made again. Leaving these out changes no bit. On a CPU, moreover, a convolution over few
pixels spends its time on reordering the weight, and MKL's float32 products are slow on an AMD: each becomes one product by
oneDNN, of other rounding.

Shapes: B batch · C D channels in and out · H W pixels · K pixels under the kernel · L pixels out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor
from torch.nn.grad import conv2d_input

from finetune.recipe.train import Train

LINEAR, CONV2D, GATED = F.linear, F.conv2d, GEGLU.forward       # torch's and diffusers' own
WORTH = 2**24       # multiplications: the Python of a smaller convolution costs more than it saves
LARGE = 300_000     # numbers in a weight from which on oneDNN's product wins; no layer of the tiny base has as many
FEW = 8             # outputs for each pixel, from which on reordering the weight costs more than copying the pixels


def wanted(train: Train, device: torch.device) -> bool:
    return train.lean if train.lean is not None else device.type == "cpu" and not train.compile


@contextmanager
def lean() -> Iterator[None]:
    """Inside, frozen layers that a gradient goes through are ours. It is the functions which layers call that are replaced,
    and no layer: outside, pictures are made and proofs given by what torch has."""
    F.linear, F.conv2d, GEGLU.forward = linear, conv2d, gated
    try:
        yield
    finally:
        F.linear, F.conv2d, GEGLU.forward = LINEAR, CONV2D, GATED


def passed(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient goes through a layer and none into it. So frozen encoders give in a step what they gave before it."""
    own = weight.requires_grad or bias is not None and bias.requires_grad
    return torch.is_grad_enabled() and x.requires_grad and not own


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (x.device.type == "cpu" and x.dtype == weight.dtype and weight.numel() >= LARGE
            and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of bfloat16 torch's own is oneDNN's."""
    ours = passed(x, weight, bias) and x.dtype == torch.float32 and by_onednn(x, weight)
    return Product.apply(x, weight, bias) if ours else LINEAR(x, weight, bias)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """As a layer calls it, with pairs; any other call is torch's."""
    if not (passed(x, weight, bias) and x.ndim == 4 and isinstance(stride, tuple) and isinstance(padding, tuple)
            and x[:, 0].numel() * weight.numel() >= WORTH):
        return CONV2D(x, weight, bias, stride, padding, dilation, groups)
    pixels = x[:, 0].numel() // (stride[0] * stride[1])
    if len(weight) < FEW * pixels or groups > 1 or not by_onednn(x, weight):
        return Convolution.apply(x, weight, bias, stride, padding, dilation, groups)
    columns_BLCK = F.unfold(x, weight.shape[2:], dilation, padding, stride).mT
    y_BLD = Product.apply(columns_BLCK, weight.flatten(1), bias)
    h, w = ((size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation))
    return y_BLD.mT.reshape(len(x), len(weight), h, w)


def gated(layer: GEGLU, x: Tensor) -> Tensor:
    return Gated.apply(layer.proj(x))


class Product(torch.autograd.Function):
    """x (…, C) times a frozen weight (D, C), by oneDNN, which takes the weight as it lies, both ways round."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, = ctx.saved_tensors
        return torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], ""), None, None


class Convolution(torch.autograd.Function):
    """torch's convolution with a frozen weight, of which nothing else is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, *how) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        return CONV2D(x, weight, bias, *how)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        weight, = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.how), *[None] * (2 + len(ctx.how))


class Gated(torch.autograd.Function):
    """The one half of x (…, 2C) times the GELU of the other."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        one, gate = x.chunk(2, -1)
        return one * F.gelu(gate)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        one, gate = ctx.saved_tensors[0].chunk(2, -1)
        return torch.cat([gradient * F.gelu(gate), torch.ops.aten.gelu_backward(gradient * one, gate)], -1)
