"""Frozen weights in few bits (Dettmers et al. 2022 and 2023, by bitsandbytes), made whole again for each use.

Layers of our own: those of bitsandbytes round the inputs too (int8), compute in the number format of the first input that they
ever saw (4 bits), and on some CPUs rewrite their weight once they are used for inference, so that a run would depend on when
it was previewed (0.50). These give the same in training and at rest, on any device, and to every method a `weight`.
"""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from finetune.errors import FinetuneError

BLOCK = 64      # weights that share a scale, of nf4; of int8 it is what makes one output


class Packed(nn.Module):
    """The numbers of a weight in few bits: `nf4` (4.5 bits each) or `int8`."""

    def __init__(self, weight: Tensor, kind: str):
        super().__init__()
        self.kind, self.dtype, self.shape = kind, weight.dtype, weight.shape
        if kind == "nf4":
            numbers, scale = torch.ops.bitsandbytes.quantize_4bit(weight.float(), BLOCK, "nf4", torch.uint8)
        else:
            numbers, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.flatten(1).half())
        self.numbers = nn.Parameter(numbers, requires_grad=False)
        # As bytes, which a change of the model's number format leaves alone.
        self.scale = nn.Parameter(scale.contiguous().view(torch.uint8), requires_grad=False)

    def forward(self) -> Tensor:
        """The weight in the format that it was loaded in."""
        numbers, scale = self.numbers, self.scale.view(torch.float32)
        if self.kind == "nf4":
            return torch.ops.bitsandbytes.dequantize_4bit(numbers, scale, BLOCK, "nf4", self.shape, self.dtype)
        found = torch.empty(numbers.shape, dtype=self.dtype, device=numbers.device)      # computed in float32, rounded once
        return torch.mul(numbers, scale[:, None] / 127, out=found).view(self.shape)


def weight(layer: nn.Module) -> nn.Parameter:
    """The whole weight of a layer: a new one each time, unless `whole` holds one."""
    return layer.whole if "whole" in layer._parameters else nn.Parameter(layer.packed(), requires_grad=False)


def product(layer: nn.Module, x: Tensor) -> Tensor:
    kind = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(kind)        # the meta device has none
    return _Product.apply(x.to(torch.get_autocast_dtype(kind)) if autocast else x, layer)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is packed and not trained."""

    weight, forward = property(weight), product

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def back(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose weight is packed and not trained."""

    weight, forward = property(weight), product

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def back(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)


class _Product(torch.autograd.Function):
    """What a layer makes of x, keeping no whole weight for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear | QuantizedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.of(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.back(gradient, ctx.layer.weight.to(gradient.dtype), ctx.shape), None


def quantize(part: nn.Module, kind: str) -> None:
    """Have the layers inside the part's blocks hold few bits: convolutions int8, linear layers as `kind` says. What stands
    around the blocks stays, and so does what transformers says is to stay in float32. Raises FinetuneError without
    bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401, it brings the operators
    except ImportError:
        raise FinetuneError(f"base.quantize: {kind} needs bitsandbytes: pip install 'finetune[8bit]'") from None
    kept = set(getattr(part, "_keep_in_fp32_modules", None) or ())
    for path, layer in part.named_modules():
        names = path.split(".")
        if type(layer) in PACKED and any(name.isdigit() for name in names) and not kept & set(names):
            packed = Packed(layer.weight.detach(), "int8" if type(layer) is nn.Conv2d else kind)
            del layer.weight
            layer.__class__, layer.packed = PACKED[type(layer)], packed


PACKED = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}


@contextmanager
def whole(modules: Iterable[nn.Module]):
    """Inside, what is quantized of these has a weight that can be changed; afterwards it is what it was."""
    layers = {module for module in modules if isinstance(module, tuple(PACKED.values()))}
    for layer in layers:
        layer.register_parameter("whole", layer.weight)
    try:
        yield
    finally:
        for layer in layers:
            del layer.whole
