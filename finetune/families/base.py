"""What every family shares: its constants, its parts in memory, and how they are written."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from finetune import device
from finetune.artifact import read_tensors, write_safetensors
from finetune.errors import FinetuneError
from finetune.families._merging import merge, merged, misfits, weight
from finetune.families._source import Changes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FamilySpec:
    """The constants of a family and its name tables."""

    name: str                               # "sd1": the word in a recipe
    components: dict[str, str]              # part -> component of the diffusers pipeline: {"denoiser": "unet", …}
    kohya: dict[str, str]                   # part -> prefix of kohya's keys: {"denoiser": "lora_unet", …}
    base_version: str                       # ss_base_model_version: "sd_v1"
    architecture: str                       # modelspec.architecture: "stable-diffusion-v1"
    targets: dict[str, tuple[str, ...]]     # a group of LoRA targets -> patterns of the denoiser's module paths
    sgm: bool = False                       # whether kohya's files have the names of the code that the family came with
    joint: bool = False                     # the same of SD 3, where q, k and v are one layer; diffusers does not read them

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders that can be trained: CLIPs, and no T5."""
        return tuple(part for part in ("text", "text_2") if part in self.components)


CLIP_ATTENTION = ("*.self_attn.q_proj", "*.self_attn.k_proj", "*.self_attn.v_proj", "*.self_attn.out_proj")
CLIP_FEED_FORWARD = ("*.mlp.fc1", "*.mlp.fc2")
CLIP_TARGETS = {"attention": CLIP_ATTENTION, "feed_forward": CLIP_FEED_FORWARD, "all": CLIP_ATTENTION + CLIP_FEED_FORWARD}


class Parts(dict):
    """A family's parts by name. One that was let go is loaded again when it is asked for, and is what it was or a
    FinetuneError: the encoders work before the first step and in the proof, and need not be in memory in between. To iterate
    loads nothing."""

    def __init__(self, load: Callable[[str], nn.Module], names: Iterable[str]):
        with device.Sparing():
            super().__init__((name, load(name)) for name in names)
        self._load, self._gone = load, {}

    def let_go(self, name: str, weights: str) -> None:
        """`weights` is the part's fingerprint."""
        del self[name]
        self._gone[name] = weights

    def __missing__(self, name: str) -> nn.Module:
        if name not in self._gone:
            raise KeyError(name)
        with device.Sparing():
            part = self._load(name).to(next(next(iter(self.values())).parameters()).device)
        if fingerprint({name: part}) != self._gone[name]:
            raise FinetuneError(f"base: the weights of its {name} are others than at the start of this run: the files were "
                                "changed meanwhile. Put them back; the same command continues from the last checkpoint")
        self[name] = part
        return part


def load(outline: Callable, path: str, dtype: torch.dtype = torch.float32, revision: str | None = None,
         variant: str | None = None, changes: Changes = Changes()):
    """The family over the base at `path`, every part frozen, in eval mode and in `dtype`. Raises FinetuneError when it is
    another family's."""
    bare = outline(path, revision, variant, changes)
    family = copy.copy(bare)        # the other holds no parts, so that those of this one go when it does
    family.parts = Parts(partial(bare.load_part, dtype=dtype), bare.kinds)
    return family


def sketch(family, dtype: torch.dtype) -> None:
    """Give an outline its parts from their configs alone; inside a FakeTensorMode they have shapes and no numbers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for part, cls in family.kinds.items():
            config = family.source.config(family.spec.components[part])
            made = cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class.from_dict(config))
            family.parts[part] = made.requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def tokenizer(spec: FamilySpec, part: str) -> str:
    """The component of a text encoder's tokenizer."""
    return spec.components[part].replace("text_encoder", "tokenizer")


def write(family, path: Path, dtype: torch.dtype) -> None:
    """The family as a diffusers folder, all or nothing, in place of an older one. FinetuneError when the disk refuses."""
    staging = path.with_name(f".{path.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        family.save(staging, dtype)
        if path.exists():       # gone as a whole, wherever a kill falls
            os.replace(path, doomed := path.with_name(f".{path.name}.old.part"))
            shutil.rmtree(doomed)
        os.replace(staging, path)
    except (OSError, SafetensorError) as e:
        raise FinetuneError(f"{path}: cannot be written: {e}; nothing is left behind") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def fingerprint(parts: dict[str, nn.Module]) -> str:
    """SHA-256 over every weight of the base: what it is, wherever it lies. Pages that were read for it are given back."""
    whole, pages = hashlib.sha256(), device.Sparing()
    for part, module in sorted(parts.items()):
        for name, tensor in sorted(module.state_dict().items()):
            whole.update(f"{part}.{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            pages.count(tensor)
    return whole.hexdigest()


def settings(module: nn.Module) -> dict:
    """What a part's config says beside its weights, such as the activation; not where it lies and who saved it."""
    config = module.config
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else config
    return {name: value for name, value in values.items()
            if not name.startswith("_") and name not in ("architectures", "dtype", "transformers_version")}


def vocabulary(tokenizer) -> dict:
    """All that decides which tokens a text becomes; calls of the tokenizer leave their padding behind, so not that."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {"length": tokenizer.model_max_length} | {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
