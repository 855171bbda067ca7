"""Learned tokens in files: one token in each, whose name most tools take from the file.

`emb_params`, as sd-scripts writes it, is what every tool reads (InvokeAI knows no other for a single encoder); with two
encoders all of them want `clip_l` and `clip_g`, diffusers' own scripts too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.artifact import Artifact
from finetune.errors import FinetuneError
from finetune.header import Header

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.families.base import FamilySpec

PARTS = {"emb_params": "text", "clip_l": "text", "clip_g": "text_2"}


def is_bare(names: Collection[str]) -> bool:
    """Whether a file says nothing of its token's name."""
    return bool(names) and set(names) <= PARTS.keys()


def is_named(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a file's one tensor has the token's name: one to 75 vectors, as wide as those of a text encoder."""
    return len(shapes) == 1 and not is_bare(shapes) and all(
        "." not in name and len(shape) in (1, 2) and shape[-1] % 64 == 0 < math.prod(shape) <= 75 * shape[-1]
        for name, shape in shapes.items())


def shapes(header: Header) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in header.tensors.items()}


def token(path: str | Path) -> str:
    """The token that a file stands for: its name, without that of a second format."""
    return Path(path).stem.removesuffix(".kohya").removesuffix(".diffusers")


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: FamilySpec) -> Artifact:
    """FinetuneError for what are no vectors, or of encoders that differ in how many they have."""
    named = {} if is_bare(tensors) else {"ss_output_name": next(iter(tensors))}
    found = {f"{PARTS.get(name, 'text')}.embedding": t[None] if t.ndim == 1 else t for name, t in tensors.items()}
    if len(found) < len(tensors) or len({t.shape[:-1] for t in found.values()}) > 1 or any(
            t.ndim != 2 or not t.numel() for t in found.values()):
        sizes = " and ".join(str(tuple(t.shape)) for t in tensors.values())
        raise FinetuneError(f"tensors of {sizes} are no token's vectors")
    return Artifact("embedding", spec.name, found, dict(metadata) | named)


def encode(artifact: Artifact, spec: FamilySpec, named: bool) -> dict[str, Tensor]:
    """Tensors under the token's name, or as most tools read them. FinetuneError for a name that none would be known by."""
    single = sum(part.startswith("text") for part in spec.components) == 1
    alone = artifact.metadata["ss_output_name"] if named else "emb_params"
    if single and "." in alone:
        raise FinetuneError(f"the token {alone!r}: a tensor with a dot in its name is taken for a layer's; rename the file, "
                            "which the token has its name from")
    keys = {"text": alone if single else "clip_l", "text_2": "clip_g"}
    return {keys[part]: t for part, t in rows(artifact).items()}


def rows(artifact: Artifact) -> dict[str, Tensor]:
    """Its vectors (n, width) by the part that they are for."""
    return {name.partition(".")[0]: t for name, t in artifact.tensors.items()}
