"""How each variant is put into a model: which tensors a layer gets, and what becomes of its output.

peft injects LoRA, LoHa and LoKr. Two are ours, as hooks. DoRA: peft learns a length for each row of the weight, which one
tool in eight reads right, and a length for each column, as here, is right in five. OFT: peft turns the inputs, of which a
convolution's cannot be turned that way, and knows no strength.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.change import core, lengths, rotations
from finetune.device import exact

NAME = "default"        # of the adapter, in peft


@dataclass(frozen=True)
class Variant:
    """`attach` puts adapters of {path: (rank, alpha)} into a part, as the words of a `Lora` say; a layer then has `roles`. Of
    these `product` are the factors of its change, and `zero` is that which is zero at the start."""

    kind: str
    roles: tuple[str, ...]
    attach: Callable[[nn.Module, dict[str, tuple[int, float]], object], None]
    zero: str = ""
    product: tuple[str, ...] = ()


def counts(method, layer: nn.Module) -> float:
    """How much the adapter of this layer counts in this pass: nothing where it is dropped, as in LyCORIS. A factor of 0 rather
    than a detour, so that all processes have a gradient for every parameter."""
    dropped = layer.training and method.words.module_dropout > 0 and torch.rand(()).item() < method.words.module_dropout
    return 0.0 if dropped else method.strength


def lora(part: nn.Module, layers: dict[str, tuple[int, float]], method) -> None:
    from peft import LoraConfig

    ranks, alphas = patterns(layers)
    part.add_adapter(LoraConfig(
        rank_pattern=ranks, alpha_pattern=alphas, lora_dropout=method.words.dropout, target_modules=list(layers),
        init_lora_weights="gaussian" if method.words.init == "gaussian" else True), NAME)
    for path in layers:
        layer = part.get_submodule(path)
        if method.words.rank_dropout:
            layer.lora_A[NAME].register_forward_hook(lambda module, args, out: _without_some_ranks(module, out, method))
        if method.words.variant == "dora":
            decompose(layer)
    follow(part, layers, method)


def follow(part: nn.Module, paths: Iterable[str], method) -> None:
    """Let peft's layers count as much as the method says, pass by pass."""
    for path in paths:
        part.get_submodule(path).register_forward_pre_hook(lambda layer, args: layer.set_scale(NAME, counts(method, layer)))


def decompose(layer: nn.Module) -> None:
    """DoRA (Liu et al. 2024) on a peft layer, with one length m for each *column* of the weight.

    m·(W + sBA)/‖W + sBA‖ scales columns, so it scales inputs: y = W(c∘x) + sBA(c∘x) with c = m/‖W + sBA‖, and no weight is
    made in a low precision. As in §4.3 the norm is a constant for the gradient. At the start m = ‖W‖, of the same numbers
    in the same order, so that c is exactly 1 and the layer exactly the base's. At strength t, as consumers merge it:
    W(x + t(c − 1)∘x) + t·sBA(c∘x)."""
    base, down, up = layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME]
    layer.dora_scale = nn.Parameter(lengths(base.weight.detach().float()))
    alpha, full = torch.tensor(float(layer.lora_alpha[NAME])), layer.lora_alpha[NAME] / layer.r[NAME]
    scale = Tensor()        # c of the running pass

    def measure(module: nn.Module, args: tuple) -> None:
        nonlocal scale
        with exact(args[0]):
            difference = core({"lora_A": down.weight.detach(), "lora_B": up.weight.detach(), "alpha": alpha})
            norm = lengths(base.weight.detach().float() + difference.reshape(base.weight.shape))
            scale = layer.dora_scale / norm

    def scaled(x: Tensor, strength: float) -> Tensor:
        return (x * (1 + strength * (scale - 1))).to(x.dtype)

    layer.register_forward_pre_hook(measure)
    base.register_forward_pre_hook(lambda module, args: (scaled(args[0], layer.scaling[NAME] / full),))
    down.register_forward_pre_hook(lambda module, args: (scaled(args[0], 1),))


def loha(part: nn.Module, layers: dict[str, tuple[int, float]], method) -> None:
    from peft import LoHaConfig

    ranks, alphas = patterns(layers)
    part.add_adapter(LoHaConfig(rank_pattern=ranks, alpha_pattern=alphas, rank_dropout=method.words.rank_dropout,
                                target_modules=list(layers)), NAME)
    follow(part, layers, method)


def lokr(part: nn.Module, layers: dict[str, tuple[int, float]], method) -> None:
    """With a rank beyond every layer's size both matrices are whole, as InvokeAI needs them to recognise the file; the scale
    is then 1, as tools that ignore the alpha of such a file have it."""
    from peft import LoKrConfig

    beyond = 10**6
    part.add_adapter(LoKrConfig(r=beyond, alpha=beyond, decompose_factor=method.words.factor, rank_dropout_scale=True,
                                rank_dropout=method.words.rank_dropout, target_modules=list(layers)), NAME)
    follow(part, layers, method)


def oft(part: nn.Module, layers: dict[str, tuple[int, float]], method) -> None:
    """OFT (Qiu et al. 2023) on the rows of the weight, in LyCORIS' convention: y − b is turned in blocks of its channels.
    The blocks start at zero, whose rotation is exactly 1."""
    for path in layers:
        layer = part.get_submodule(path)
        rows = layer.weight.shape[0]
        block = max(size for size in range(1, method.words.block + 1) if rows % size == 0)
        layer.oft_blocks = nn.Parameter(torch.zeros(rows // block, block, block, device=layer.weight.device))
        layer.register_forward_hook(lambda module, args, out: _turned(module, out, method))


def _turned(layer: nn.Module, out: Tensor, method) -> Tensor:
    channels = 1 if isinstance(layer, nn.Conv2d) else -1
    with exact(out):
        blocks = layer.oft_blocks
        y = out.float().movedim(channels, -1)
        y = (y if layer.bias is None else y - layer.bias).unflatten(-1, blocks.shape[:2])
        turned = torch.einsum("knm,...kn->...km", rotations(blocks), y)
        return out + (counts(method, layer) * (turned - y)).flatten(-2).movedim(-1, channels).to(out.dtype)


def _without_some_ranks(down: nn.Module, out: Tensor, method) -> Tensor:
    """Each rank is dropped for the whole batch, as in LyCORIS; those that stay count as much more."""
    if not down.training:
        return out
    channels = 1 if isinstance(down, nn.Conv2d) else -1
    stays = (torch.rand(out.shape[channels]) >= method.words.rank_dropout).to(out.device, out.dtype, non_blocking=True)
    return (out.movedim(channels, -1) * (stays / (1 - method.words.rank_dropout))).movedim(-1, channels)


def patterns(layers: dict[str, tuple[int, float]]) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas as peft takes them: one regular expression for all paths of the same number."""
    def grouped(index: int) -> dict[str, float]:
        numbers = sorted({numbers[index] for numbers in layers.values()})
        return {"^(" + "|".join(re.escape(path) for path, own in layers.items() if own[index] == number) + ")": number
                for number in numbers}
    return grouped(0), grouped(1)


LOW_RANK = ("lora_A", "lora_B")
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
VARIANTS = {
    "lora": Variant("lora", LOW_RANK, lora, "lora_B", LOW_RANK),
    "rslora": Variant("lora", LOW_RANK, lora, "lora_B", LOW_RANK),
    "dora": Variant("dora", (*LOW_RANK, "dora_scale"), lora, "lora_B"),
    "loha": Variant("loha", HADAMARD, loha, "hada_w2_b", HADAMARD),
    "lokr": Variant("lokr", ("lokr_w1", "lokr_w2"), lokr, "lokr_w1", ("lokr_w1", "lokr_w2")),
    "oft": Variant("difference", ("oft_blocks",), oft),
}


def tensor(layer: nn.Module, role: str) -> nn.Parameter:
    own = getattr(layer, role)
    if isinstance(own, nn.ModuleDict):
        return own[NAME].weight
    return own[NAME] if isinstance(own, nn.ParameterDict) else own
