"""The parts of a family: loaded, outlined, let go and written the same way in all of them."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from finetune.artifact import read_tensors, write_safetensors
from finetune.families.base import Changes, FamilySpec


class Parts(dict):
    """A family's parts by name. One that was let go is loaded again, as it first was, when it is asked for: the encoders work
    before the first step and in the proof, and need not be in memory in between. To iterate loads nothing."""

    def __init__(self, load: Callable[[str], nn.Module], names: Iterable[str]):
        super().__init__((name, load(name)) for name in names)
        self._load, self._known = load, frozenset(self)

    def __missing__(self, name: str) -> nn.Module:
        if name not in self._known:
            raise KeyError(name)
        self[name] = self._load(name).to(next(next(iter(self.values())).parameters()).device)
        return self[name]


def sketched(cls: type[nn.Module], config: dict, dtype: torch.dtype) -> nn.Module:
    """A part from its config alone: in no time and without memory inside a FakeTensorMode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        part = cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class.from_dict(config))
        return part.requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def load(outline: Callable, path: str, dtype: torch.dtype = torch.float32, revision: str | None = None,
         variant: str | None = None, changes: Changes = Changes()):
    """The family over the base at `path`, every part frozen, in eval mode and in `dtype`. Raises FinetuneError when it is another
    family's."""
    bare = outline(path, revision, variant, changes)
    family = copy.copy(bare)        # the other holds no parts, so that those of this one go when it does
    family.parts = Parts(partial(bare.load_part, dtype=dtype), bare.kinds)
    return family


def sketch(family, dtype: torch.dtype) -> None:
    """Give an outline its parts from their configs alone; inside a FakeTensorMode they have shapes and no numbers."""
    family.parts |= {part: sketched(kind, family.source.config(family.spec.components[part]), dtype)
                     for part, kind in family.kinds.items()}


def tokenizer(spec: FamilySpec, part: str) -> str:
    """The component of a text encoder's tokenizer."""
    return spec.components[part].replace("text_encoder", "tokenizer")


def save(family, folder: Path, dtype: torch.dtype) -> None:
    """A diffusers folder with the weights in `dtype`, under the published names."""
    for module in family.parts.values():
        module.to(dtype)
    for words in family.tokenizers.values():        # how they were last called would be saved with them
        words.backend_tokenizer.no_padding()
        words.backend_tokenizer.no_truncation()
    family.pipeline().save_pretrained(folder)
    for part in family.spec.encoders:
        publish_text_encoder(folder / family.spec.components[part])
        words = family.tokenizers[part].backend_tokenizer.model
        words.save(str(folder / tokenizer(family.spec, part)))      # vocab.json, merges.txt


def publish_text_encoder(folder: Path) -> None:
    """Rewrite a saved CLIP under the names with `text_model.`: what transformers ≥ 5.6 saves without it, no tool reads."""
    file = folder / "model.safetensors"
    tensors = {name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": t
               for name, t in read_tensors(file).items()}
    write_safetensors(file, tensors, {"format": "pt"})
