"""An adapter in memory, and safetensors files: atomic, reproducible writes; `header.py` has the peeks."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.disk import forsaken, replacing, sync
from finetune.errors import FinetuneError
from finetune.header import MAX_HEADER_BYTES, read_header

if TYPE_CHECKING:  # torch takes seconds to import, and a peek at a header does not need it
    from torch import Tensor

DTYPE_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}


WHOLE = ("full", "vae", "control")      # the kinds that hold weights, not changes
MEASURED = ("lora", "loha", "lokr", "difference")       # those whose change needs no base to be measured


@dataclass(frozen=True)
class Artifact:
    """What a method trained, under the names of the published diffusers layout.

    Each adapted module has tensors `<part>.<module path>.<role>`. Part is "denoiser", "text" or "text_2"; paths of a
    CLIP text encoder keep their `text_model.`, whatever transformers calls them. `change.py` has the formulas.

        kind            roles
        lora            lora_A (r, in[, kh, kw]) · lora_B (out, r[, 1, 1]) · alpha (), the same for all modules
        dora            as lora, and dora_scale (1, in[, 1, 1]): the length of each column of the changed weight
        loha            hada_w1_a, hada_w2_a (out, r) · hada_w1_b, hada_w2_b (r, in·kh·kw) · alpha ()
        lokr            lokr_w1 (a, c) · lokr_w2 (b, d[, kh, kw]) · alpha (), which is 1
        oft             oft_blocks (k, n, n) · alpha (), which is 0: unconstrained
        difference      diff, in the shape of the weight: of a layer, or of a norm
        embedding       embedding (n, width), with no path between part and role: the vectors of a learned token
        full, vae       weight, bias: not a change but what the base's become; part of vae is "vae"
        control         weight, bias: those of a branch beside the base, whose part is "control"

    A file of others may mix them, from module to module, and may have beside any of them a dora_scale, and a diff_b: the
    difference of its bias.
    """

    kind: str
    family: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def modules(tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The adapted modules of canonical tensors, sorted: {(part, module path): {role: tensor}}."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name in sorted(tensors):
        stem, _, role = name.rpartition(".")
        part, _, path = stem.partition(".")
        found.setdefault((part, path), {})[role] = tensors[name]
    return found


def published(path: str) -> str:
    """A module path with the `text_model.` that transformers >= 5.6 and some files leave out."""
    flat = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return f"text_model.{path}" if path.startswith(flat) else path


def fold_alpha(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with one alpha for all of its LoRA modules: what differs is multiplied into lora_B.

    diffusers gives every module of a kohya file the same alpha, the most frequent one. Tensors come back as
    they are when the alphas agree already; a lora_B whose dtype cannot hold the product becomes float32.
    """
    import torch

    stems = [name.removesuffix(".lora_B") for name in tensors if name.endswith(".lora_B")]
    alphas = {stem: tensors[f"{stem}.alpha"].item() for stem in stems}
    counts = Counter(alpha for alpha in alphas.values() if alpha)
    if len(set(alphas.values())) <= 1:
        return tensors
    common = max(counts, key=lambda alpha: (counts[alpha], alpha))
    folded = dict(tensors)
    for stem, alpha in alphas.items():
        if alpha != common:
            up = tensors[f"{stem}.lora_B"]
            exact = up.float() * (alpha / common)
            narrow = exact.to(up.dtype)
            folded[f"{stem}.lora_B"] = narrow if torch.equal(narrow.float(), exact) else exact
            folded[f"{stem}.alpha"] = torch.tensor(common, dtype=torch.float32)
    return folded


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on nothing but its content, all of it or nothing.

    The safetensors library (0.8) writes metadata in random order, so the header is made here, sorted.
    The file gets its name only once it is complete and on disk; FinetuneError when the disk refuses.
    """
    path = Path(path)
    for key, value in metadata.items():
        assert isinstance(value, str), f"metadata {key!r} must be text, got {type(value).__name__}"
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in _order(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES, f"{path}: a header of {len(text)} bytes, which no reader would take"

    try:
        for torn in filter(forsaken, path.parent.glob(f".{escape(path.name)}.*.part")):     # a killed one may be gigabytes
            torn.unlink(missing_ok=True)
        with replacing(path) as staged, open(staged, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for data in data_of(tensors):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
    except OSError as error:
        raise FinetuneError(
            f"{path}: cannot write {(len(text) + offset) / 2**20:.1f} MiB: {error.strerror or error}\n"
            f"    check that {path.parent} exists, can be written to and has space; an old file is untouched"
        ) from error


def data_of(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """What a file of these tensors holds behind its header, one tensor after the other."""
    import torch

    for name in _order(tensors):
        # Through uint8, because numpy has no bfloat16; flattened first, because a 0-dim tensor has no other view.
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide elements first, as the library does, so that every tensor is aligned to its own element size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def weights_of(path: str | Path) -> Path:
    """The file itself; of a folder, as diffusers has it for one part, its weights."""
    return Path(path) / "diffusion_pytorch_model.safetensors" if Path(path).is_dir() else Path(path)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, in their own dtype. FinetuneError as in `read_header`."""
    read_header(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise FinetuneError(f"{path}: is not a sound safetensors file: {error}") from error
