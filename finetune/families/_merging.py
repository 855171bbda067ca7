"""Adapters in the weights of a base: where each belongs, whether it fits, and the sum."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune import tokens
from finetune.artifact import WHOLE, Artifact, modules
from finetune.change import change, misfit
from finetune.errors import FinetuneError
from finetune.families import _control
from finetune.families._quantized import whole


def layer(parts: dict[str, nn.Module], part: str, path: str) -> nn.Module | None:
    """A module by its published name; transformers ≥ 5.6 drops `text_model.` in memory."""
    for name in (path, path.removeprefix("text_model.")):
        try:
            return parts[part].get_submodule(name)
        except (KeyError, AttributeError):
            continue
    return None


def weight(parts: dict[str, nn.Module], part: str, path: str, role: str = "weight") -> nn.Parameter | None:
    """The weight, or the bias, of a module by its published name. Of a quantized layer a copy, but within `merged`."""
    try:
        return layer(parts, part, path).get_parameter(role)
    except AttributeError:
        return None


def touched(parts: dict[str, nn.Module], artifact: Artifact):
    """(module, what it changes there, how): the roles of a change, or the tensor that the weight becomes."""
    for (part, path), module in modules(artifact.tensors).items():
        if artifact.kind in WHOLE:
            yield from ((f"{part}.{path}", weight(parts, part, path, role), tensor) for role, tensor in module.items())
        else:
            yield f"{part}.{path}", weight(parts, part, path), module
            if "diff_b" in module:
                yield f"{part}.{path}.bias", weight(parts, part, path, "bias"), {"diff": module["diff_b"]}


def misfits(parts: dict[str, nn.Module], artifact: Artifact) -> list[str]:
    """The modules of an adapter that these parts do not have, or have in another shape."""
    if artifact.kind == "embedding":
        return tokens.misfits(parts, {name.partition(".")[0]: t for name, t in artifact.tensors.items()})
    if artifact.kind == "control":
        return _control.misfits(parts["denoiser"], artifact.tensors)
    found = []
    for stem, p, how in touched(parts, artifact):
        if p is None:
            found.append(f"{stem}: the base has no such module")
        elif why := misfit({"diff": how} if isinstance(how, Tensor) else how, p):
            found.append(f"{stem}: {why}")
    return found


@torch.no_grad()
def merge(parts: dict[str, nn.Module], adapters: list[tuple[Artifact, float]]) -> list[tuple[nn.Parameter, Tensor]]:
    """Add what each adapter changes in these weights, times its strength; summed in float32 and rounded once.

    What depends on the weight, as in a DoRA, is made from the weight as it was before, so that the order of the adapters
    does not matter. Returns what the weights were. Raises FinetuneError, with nothing changed, when one does not fit."""
    if any(artifact.kind in ("embedding", "control") for artifact, _ in adapters):
        raise FinetuneError("a learned token or a control branch cannot be merged into weights: it stays beside the model")
    wrong = [misfit for artifact, _ in adapters for misfit in misfits(parts, artifact)]
    if wrong:
        count = len({key for artifact, _ in adapters for key in modules(artifact.tensors)})
        head = f"the adapter does not fit this base: {len(wrong)} of {count} modules"
        raise FinetuneError("\n    ".join([head, *wrong[:5]]))
    before: dict[nn.Parameter, Tensor] = {}
    sums: dict[nn.Parameter, Tensor] = {}
    for artifact, strength in adapters:
        for _, p, how in touched(parts, artifact):
            before.setdefault(p, p.data)
            sums.setdefault(p, p.float())
            if isinstance(how, Tensor):     # at 1 exactly that, since p − p is 0
                sums[p] = sums[p] - p.float() + torch.lerp(p.float(), how.to(p.device).float().reshape(p.shape), strength)
            else:
                sums[p] = sums[p] + strength * change(how, p)
    for p, value in sums.items():       # not written into: what is mapped from a file stays so, and has no copy
        p.data = value.to(p.dtype)
    return list(before.items())


@contextmanager
def merged(parts: dict[str, nn.Module], adapters: list[tuple[Artifact, float]]):
    """Inside, the weights hold the merged adapters; afterwards, what they were, bit for bit."""
    changed = (layer(parts, *key) for artifact, _ in adapters for key in modules(artifact.tensors))
    with whole(m for each in changed if each is not None for m in each.modules()):
        before = merge(parts, adapters)
        try:
            yield
        finally:
            for p, value in before:
                p.data = value
