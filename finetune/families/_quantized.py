"""Frozen weights in few bits (Dettmers et al. 2022 and 2023, by bitsandbytes), made whole again for each use.

Layers of our own: those of bitsandbytes round the inputs too (int8), compute in the number format of the first input that they
ever saw (4 bits), and on some CPUs rewrite their weight once they are used for inference, so that a run would depend on when
it was previewed (0.50). These give the same in training and at rest, on any device, and to every method a `weight`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import FinetuneError

BLOCK = 64      # weights that share a scale, of nf4; of int8 it is a row


class Quantized(nn.Linear):
    """A linear layer of `nf4` (4.5 bits a weight) or `int8`, whose weight is not trained."""

    def __init__(self, layer: nn.Linear, kind: str):
        nn.Module.__init__(self)        # without a weight
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.kind, self.dtype, weight = kind, layer.weight.dtype, layer.weight.detach()
        ops = torch.ops.bitsandbytes
        if kind == "nf4":
            packed, scale = ops.quantize_4bit(weight.float(), BLOCK, "nf4", torch.uint8)
        else:
            packed, scale, _ = ops.int8_vectorwise_quant(weight.half())
        self.packed = nn.Parameter(packed, requires_grad=False)
        # As bytes, which a change of the model's number format leaves alone.
        self.scale = nn.Parameter(scale.contiguous().view(torch.uint8), requires_grad=False)

    @property
    def weight(self) -> nn.Parameter:
        """The whole weight in the format that it was loaded in: a new one each time, unless `whole` holds one."""
        if "whole" in self._parameters:
            return self.whole
        packed, scale, shape = self.packed, self.scale.view(torch.float32), (self.out_features, self.in_features)
        if self.kind == "nf4":
            weight = torch.ops.bitsandbytes.dequantize_4bit(packed, scale, BLOCK, "nf4", shape, self.dtype)
        else:
            weight = (packed.float() * (scale[:, None] / 127)).to(self.dtype)
        return nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _Linear.apply(x.to(dtype), self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, keeping no whole weight for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def quantize(part: nn.Module, kind: str) -> None:
    """Have the linear layers inside the part's blocks hold few bits. What stands around the blocks stays, and so does what
    transformers says is to stay in float32. Raises FinetuneError without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401, it brings the operators
    except ImportError:
        raise FinetuneError(f"base.quantize: {kind} needs bitsandbytes: pip install 'finetune[8bit]'") from None
    kept = set(getattr(part, "_keep_in_fp32_modules", None) or ())
    for path, layer in list(part.named_modules()):
        names = path.split(".")
        if isinstance(layer, nn.Linear) and any(name.isdigit() for name in names) and not kept & set(names):
            setattr(part.get_submodule(path.rpartition(".")[0]), names[-1], Quantized(layer, kind))


@contextmanager
def whole(modules: Iterable[nn.Module]):
    """Inside, what is quantized of these has a weight that can be changed; afterwards it is what it was."""
    layers = {module for module in modules if isinstance(module, Quantized)}
    for layer in layers:
        layer.register_parameter("whole", layer.weight)
    try:
        yield
    finally:
        for layer in layers:
            del layer.whole
