"""A base that is not taken as it is: with parts from elsewhere, without the last layers of its text encoder, in few bits."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from finetune import registry
from finetune.errors import FinetuneError
from finetune.header import read_header
from finetune.families import _single
from finetune.families._identify import identify
from finetune.families._quantized import quantize
from finetune.families._source import Changes, Source, check_family, locate
from finetune.families.base import FamilySpec


@dataclass(frozen=True)
class Altered:
    """A source that stands before another: what is changed comes from here, all else from there."""

    source: Source | _single.SingleFile
    changes: Changes
    replaced: dict[str, str]        # component -> the part that it is
    without: tuple[str, ...] = ()   # components that are left out

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where each part comes from, and what cannot be known: the VAEs of SD 1 and SDXL are alike but for the factor that
        their latents are scaled by, and this is in a config only."""
        found = list(self.source.notes)
        for component, part in self.replaced.items():
            unsure = "; a file does not say how its latents are scaled: it is taken for one of this family"
            path = self.path_of(component)
            bare = part == "vae" and path.is_file() and identify(read_header(path)).name is None
            found.append(f"its {part} is that of {path.name}" + unsure * bare)
        return tuple(found)

    def path_of(self, component: str) -> Path:
        return Path(os.path.expanduser(self.changes.parts[self.replaced[component]]))

    def has(self, component: str) -> bool:
        encoder = component.replace("tokenizer", "text_encoder")
        return encoder not in self.without and (encoder in self.replaced or self.source.has(component))

    def tokenizer(self, component: str):
        """The base's own. Where it has none, as single files have none of T5, that of the model which the encoder is from."""
        part, path = self.replaced.get(encoder := component.replace("tokenizer", "text_encoder")), None
        if not part or self.source.has(component):
            return self.source.tokenizer(component)
        if not ((path := self.path_of(encoder)) / component).is_dir():
            raise FinetuneError(f"base.{part}: {path} has no {component}, and neither has the base: give the diffusers folder "
                                "of a whole model that has both")
        return locate(str(path)).tokenizer(component)

    def config(self, component: str) -> dict:
        """What a folder says of its own part goes before what the base says: such as that a VAE can do with float16."""
        folder = component in self.replaced and _single.folder_of(self.path_of(component), component)
        return Source(str(folder.parent), None, None, {}).config(folder.name) if folder else self.source.config(component)

    def scheduler(self, *component: str):
        """The base's own, or one with the noising that the words say."""
        import diffusers

        own, how = self.source.scheduler(*component), (self.changes.prediction, self.changes.zero_snr)
        if component or how == (None, None):
            return own
        if "prediction_type" not in own.config:
            raise FinetuneError("base.prediction: a base on rectified flow predicts its velocity; leave it and zero_snr out")
        config = _single.noised({**own.config, "_class_name": type(own).__name__}, *how)
        return getattr(diffusers, config["_class_name"]).from_config(config)

    def load(self, cls: type, component: str, dtype: torch.dtype) -> nn.Module:
        load = self.replacement if component in self.replaced else self.source.load
        found = load(cls, component, dtype)
        if component.startswith("text_encoder"):
            leave_out(found, self.changes.clip_skip - 1)
        if self.changes.quantize and component != "vae":
            quantize(found, self.changes.quantize)
        return found

    def replacement(self, cls: type, component: str, dtype: torch.dtype) -> nn.Module:
        part, path = self.replaced[component], self.path_of(component)
        try:
            if part == "denoiser":
                own, base = predicts(path), self.scheduler().config.get("prediction_type")
                if own and own != base:
                    raise FinetuneError(f"{path}: it predicts {own}, and the base {base}: give it as base.path")
            known = isinstance(self.source, _single.SingleFile) or self.source.has(component)      # a file's family says it
            config = (self.source if known else self).config(component)
            return _single.part(path, cls, component, dtype, config)
        except FinetuneError as e:
            raise FinetuneError(f"base.{part}: {str(e).removeprefix('base.path: ')}") from None


def opened(spec: FamilySpec, path: str, revision: str | None, variant: str | None, changes: Changes) -> Source | Altered:
    """The source of a family's base with these changes. Raises FinetuneError for one of another family, and as `altered`."""
    source = locate(path, revision, variant)
    check_family(source, spec.name, registry.names("families"))
    return altered(source, spec, changes)


def altered(source: Source, spec: FamilySpec, changes: Changes) -> Source | Altered:
    """The source with these changes. Raises FinetuneError for those that the family does not know, and for missing parts."""
    if changes != Changes():
        source = _changed(source, spec, changes)
    missing = [part for part, component in spec.components.items() if part != "text_3" and not source.has(component)]
    if missing:
        lacks = " and no ".join(spec.components[part] for part in missing)
        raise FinetuneError(f"base.path: {source.path}: it holds no {lacks}: give a whole checkpoint, or beside it "
                            + " and ".join(f"base.{part} (--{part.replace('_', '-')})" for part in missing))
    return source


# Parts, what their configs say, and what that of the denoiser has to say of their sum.
WIDTHS = ((("text", "text_2"), "hidden_size", "cross_attention_dim"), (("text_3",), "d_model", "joint_attention_dim"),
          (("text", "text_2"), "projection_dim", "pooled_projection_dim"), (("vae",), "latent_channels", "out_channels"))


def check_widths(source: Source | Altered, spec: FamilySpec) -> None:
    """Raise FinetuneError for parts that the denoiser cannot be shown, going by the configs."""
    denoiser = source.config(spec.components["denoiser"])
    for words, field, wanted in WIDTHS:
        parts = [part for part in words if source.has(spec.components.get(part, ""))]
        widths = [source.config(spec.components[part]).get(field) for part in parts]
        known = parts and all(isinstance(width, int) for width in (*widths, denoiser.get(wanted)))
        if known and sum(widths) != denoiser[wanted]:
            word = next((part for part in (*parts, "denoiser") if part in source.changes.parts), "path")
            path = source.changes.parts.get(word, source.path)
            raise FinetuneError(f"base.{word}: {path}: {field} of {' + '.join(parts)} is {' + '.join(map(str, widths))}, and "
                                f"the denoiser's {wanted} {denoiser[wanted]}: they are of different models")


def _changed(source: Source | _single.SingleFile, spec: FamilySpec, changes: Changes) -> Altered:
    if unknown := [part for part in changes.parts if part not in spec.components]:
        raise FinetuneError(f"base.{unknown[0]}: {spec.name} has no such part; it has {', '.join(spec.components)}")
    without = [part for part, path in changes.parts.items() if path == "none"]
    if needed := [part for part in without if part != "text_3"]:
        raise FinetuneError(f"base.{needed[0]}: {spec.name} cannot do without it; none is for text_3, the T5 of sd3")
    if changes.clip_skip > 1 and "text_2" in spec.components:
        raise FinetuneError(f"base.clip_skip: {spec.name} always takes its text encoders one layer before the last; "
                            "leave it out")
    return Altered(source, changes, {spec.components[part]: part for part in changes.parts if part not in without},
                   tuple(spec.components[part] for part in without))


def predicts(path: Path) -> str | None:
    """What a denoiser's file, or the model around it, says that it predicts."""
    if path.is_file():
        return _single.source(str(path)).known.prediction
    return locate(str(path)).scheduler().config.get("prediction_type") if (path / "model_index.json").is_file() else None


class Layers(nn.ModuleList):
    """The layers of an encoder, of which the last `unused` do not run. They stay where they are, so that what is written is
    whole, and an adapter that has something for them still fits."""

    unused = 0

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), len(self) - self.unused)


def leave_out(encoder: nn.Module, count: int) -> None:
    """Have the encoder end so many layers earlier, its last norm behind them, as web UIs do for a clip skip of count + 1.

    Raises FinetuneError when it has not as many."""
    if not count:
        return
    owner = next(m for m in encoder.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList))
    if count >= len(owner.layers):
        most = len(owner.layers)
        raise FinetuneError(f"base.clip_skip: {count + 1} leaves none of the {most} layers; at most {most}")
    owner.layers = Layers(owner.layers)
    owner.layers.unused = count


def unused(module: nn.Module) -> tuple[str, ...]:
    """What the paths begin with of layers that do not run."""
    return tuple(f"{path}.{i}." for path, m in module.named_modules() if isinstance(m, Layers)
                 for i in range(len(m) - m.unused, len(m)))
