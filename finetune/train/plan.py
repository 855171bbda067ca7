"""How much memory a recipe needs, from the base's configs alone: nothing is downloaded but these, and nothing computed.

The base, its methods and one step are run on torch's meta device, where tensors have shapes and no numbers, and every storage
that is made is counted until it is freed. So what is counted is what torch's allocator is asked for at its peak: activations
and gradients as autograd keeps them, and what passes. Not counted: the process itself, the context of a GPU, what an allocator
holds beside what it was asked for, and autocast, which makes activations of a float32 base smaller than said here.

Shapes: B batch · L tokens · D text width · C latent channels · H W pixels · h w = H W / VAE stride.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from finetune import device, registry
from finetune.batch import Batch, Conditioning
from finetune.data.buckets import sizes
from finetune.families import base as families
from finetune.families import sd3
from finetune.families._quantized import quantize
from finetune.recipe import Recipe
from finetune.train import ground
from finetune.train.lean import lean, wanted
from finetune.train.release import released
from finetune.train.sampling import previews
from finetune.train.together import built

STATE = {"adamw": 8, "adamw8bit": 2 + 8 / 256, "lion": 4, "lion8bit": 1 + 4 / 256, "adafactor": 0, "prodigy": 16,
         "schedule_free_adamw": 8, "sgd": 4}        # bytes of the optimizer for each number that is trained
AT_ONCE = 8         # pictures that a preview samples together
TOKENS = 77

# What each lever sets, and what it costs; the mildest first.
LEVERS = {
    "train.lean=true": "the same numbers; some Python in every step",
    "every.preview=0": "no pictures on the way; the encoders leave the memory",
    "train.gradient_checkpointing=selective": "the same numbers; norms and shallow layers are computed twice",
    "train.gradient_checkpointing=true": "the same numbers, about a third slower",
    "train.batch_size=1": "with as much more gradient_accumulation: other rounding, slower on a GPU",
    "base.dtype=bfloat16": "frozen weights and their computation in 8 bits of precision",
    "base.quantize=int8": "frozen weights rounded to 8 bits and made whole again in every step",
    "base.quantize=nf4": "frozen linear layers rounded to 4 bits, convolutions to 8, and made whole again in every step",
    "train.optimizer=adamw8bit": "its state is rounded",
    "data.crop=center": "always the same part of a picture; the VAE leaves the memory",
}


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of each phase, and what they are made of. A phase is over before the next."""

    weights: dict[str, int]     # of every part
    trained: int                # numbers that are trained
    gradients: int
    state: int                  # of the optimizer, and the average if there is one
    phases: dict[str, int]      # caching, training, optimizer step, preview -> peak
    flops: int                  # operations of a step, by torch's counter

    @property
    def peak(self) -> int:
        return max(self.phases.values())


class Live(TorchDispatchMode):
    """Inside, the bytes of all storages that are made and not freed yet, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, out)
        return out

    def count(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if (key := storage._cdata) not in self.known:
            self.known.add(key)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, key, size)

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def over(self, work) -> int:
        """Bytes at the peak of a piece of work beyond those before it."""
        before = self.peak = self.now
        work()
        return self.peak - before


empty = partial(torch.empty, device="meta")


@contextmanager
def flash() -> Iterator[None]:
    """Inside, attention is the kernel that CPU and GPU take, which keeps no matrix of all pairs; the meta device takes
    another. A function mode would not do: a backward leaves it, and a checkpoint computes anew in there."""
    own, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, **_) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def needs(recipe: Recipe) -> Need:
    """Raises FinetuneError for a base that cannot be found, and for words of a method that name none of its layers."""
    family = registry.find("families", recipe.base.family).outline(
        recipe.base.path, recipe.base.revision, recipe.base.variant, ground.changes(recipe))
    H, W = largest(recipe)
    h, w = H // family.stride, W // family.stride
    with flash(), Live() as live:
        with torch.device("meta"):      # not in the step: peft asks there for the value of a random number
            family.sketch(families.DTYPES[recipe.base.dtype])
            if recipe.base.quantize:
                for name in family.parts.keys() - {"vae"}:
                    quantize(family.parts[name], recipe.base.quantize)
            weights = {name: size(part) for name, part in family.parts.items()}
            # A token for each value of a column counts as one, since pictures are not looked at.
            method = built(recipe, {name: token.model_copy(update={"init": token.init or "a"}) for words in recipe.method
                                    if words.kind == "embedding" for name, token in words.tokens.items()})
            method.install(family)
            objective = decoding(recipe) if method.objective == "decode" else None
        if "control" in family.parts:
            weights["control"] = size(family.parts["control"])
        networks = objective.networks if objective else {}
        weights |= {name: size(network) for name, network in networks.items()}
        vae = family.parts["vae"]
        own = [*method.parameters().values()]
        parameters = own + [p for network in networks.values() for p in network.parameters()]
        count = sum(p.numel() for p in parameters)
        gradients = sum(p.nbytes for p in parameters)
        state = int(count * (STATE[recipe.train.optimizer] + 4 * bool(recipe.train.ema)))
        adapters = gradients if any(words.kind in ("lora", "embedding") for words in recipe.method) else 0
        copy = 0 if adapters else sum(p.nbytes for p in own)        # to go back to: on a GPU's machine it is in the RAM

        def drawn(count: int, latents: bool = False) -> Tensor:
            shape = (count, vae.config.latent_channels, h, w) if latents else (count, 3, H, W)
            return torch.empty(shape, dtype=vae.dtype, device=vae.device)

        def loss() -> Tensor:
            if objective is None:
                return denoise(family, B, h, w, any(part.startswith("text") for part in method.trains)).square().mean()
            return objective(family, Batch(list(range(B)), [""] * B, empty(B), 1.0, empty(B, 6), empty(B, 3, H, W)), 0).loss

        denoises, B = method.objective == "denoise", recipe.train.batch_size
        everything = sum(weights.values()) + adapters
        phases = {}
        if denoises:
            with torch.no_grad():
                phases["caching"] = everything - weights["denoiser"] + live.over(lambda: vae.encode(drawn(1)).latent_dist.mean)
        if recipe.train.gradient_checkpointing:
            method.compute_twice(family, recipe.train.gradient_checkpointing)
        for part in method.trains:
            family.parts[part].train()
        light = lean() if wanted(recipe.train, device.best()) else nullcontext()    # as on this machine
        with counter() as flops, light:
            step = live.over(lambda: one_step(recipe, parameters, loss))
        kept = ground.needed(recipe, method.trains, weights, latents=recipe.data.crop != "random", texts=True)
        held = sum(weights[part] for part in kept | networks.keys()) + adapters + state
        phases["training"] = held + copy + step
        stepping = [p.nbytes + 8 * p.numel() * (p.dtype == torch.bfloat16) for p in parameters]     # bfloat16 steps in float32
        phases["optimizer step"] = held + copy + (max if recipe.train.gradient_release else sum)(stepping)
        if recipe.every.preview and denoises:
            n = min(AT_ONCE, len(previews(recipe)))
            guided = 2 if recipe.preview.guidance > 1 else 1
            with torch.no_grad():
                sampled = live.over(lambda: denoise(family, n * guided, h, w))
                decoded = live.over(lambda: vae.decode(drawn(n, latents=True)).sample)
            phases["preview"] = everything + state + copy + max(sampled, decoded)
    return Need(weights, count, gradients, state, phases, flops.get_total_flops() * recipe.train.gradient_accumulation)


class Flat(nullcontext):
    """In place of the counter's look at which module it is in, whose hooks keep a graph, and what it saved, until Python's
    garbage is collected."""

    parents = {"Global"}


def counter() -> FlopCounterMode:
    """torch's counter, with what it does not know of the CPU: attention, and oneDNN's products."""
    aten = torch.ops.aten
    onednn = {torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * x.numel() * w[0]} \
        if torch.backends.mkldnn.is_available() else {}
    found = FlopCounterMode(display=False, custom_mapping=onednn | {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)})
    found.mod_tracker = Flat()
    return found


def largest(recipe: Recipe) -> tuple[int, int]:
    if not (buckets := recipe.data.buckets):
        return recipe.data.resolution, recipe.data.resolution
    known = sizes(recipe.data.resolution, buckets.step, buckets.shortest, buckets.longest)
    return tuple(known[known.prod(1).argmax()].tolist())


def size(part: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*part.parameters(), *part.buffers()))


def decoding(recipe: Recipe):
    """The objective, but for what has to be fetched or drawn from numbers."""
    words = recipe.objective.model_dump(exclude={"kind"}, exclude_none=True) | {"lpips": 0.0, "sample": False}
    return registry.find("objectives", recipe.objective.kind).build(**words, step_size=recipe.train.batch_size)


def one_step(recipe: Recipe, parameters: list[torch.nn.Parameter], loss: Callable[[], Tensor]) -> None:
    with released(torch.optim.SGD(parameters), lambda norm: None) if recipe.train.gradient_release else nullcontext():
        loss().backward()
    for p in parameters:
        p.grad = None


def denoise(family, B: int, h: int, w: int, said: bool = False) -> Tensor:
    """The network's prediction; where captions are `said` in the step, text encoders are run too."""
    denoiser = family.parts["denoiser"]
    if said:
        told = family.encode_text([""] * B)
    else:
        config, length = denoiser.config, TOKENS + (sd3.LENGTH if "text_3" in family.parts else 0)
        width = config.get("cross_attention_dim") or config.joint_attention_dim
        pooled = config.get("pooled_projection_dim") or "text_2" in family.parts and family.parts["text_2"].config.projection_dim
        told = Conditioning(empty(B, length, width), empty(B, pooled) if pooled else None,
                            level=empty(B, dtype=torch.long) if family.shows == "small" else None,
                            control=empty(B, 3, h * family.stride, w * family.stride) if "control" in family.parts else None)
    return family.denoise(empty(B, denoiser.config.in_channels, h, w), empty(B, dtype=torch.long), told, empty(B, 6))
