"""An adapter in memory, and safetensors files: atomic, reproducible writes and header-only peeks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError

if TYPE_CHECKING:  # torch takes seconds to import, and a peek at a header does not need it
    from torch import Tensor

MAX_HEADER_BYTES = 16 * 2**20
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}
DTYPE_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}


WHOLE = ("full", "vae")     # the kinds that hold weights, not changes


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
        difference      diff, in the shape of the weight
        embedding       embedding (n, width), with no path between part and role: the vectors of a learned token
        full, vae       weight, bias: not a change but what the base's become; part of vae is "vae"

    A file of others may mix them, from module to module, and may have a dora_scale beside any of them.
    """

    kind: str
    family: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data: nothing here needs torch."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)
    metadata: dict[str, str]
    scalars: dict[str, float]  # the value of each 0-dim float tensor: alphas


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
    # Wide elements first, as the library does, so that every tensor is aligned to its own element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES, f"{path}: a header of {len(text)} bytes, which no reader would take"

    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with open(staged, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for name in order:
                    file.write(_bytes(tensors[name]))
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except BaseException:
            with contextlib.suppress(OSError):
                staged.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise FinetuneError(
            f"{path}: cannot write {(len(text) + offset) / 2**20:.1f} MiB: {error.strerror or error}\n"
            f"    check that {path.parent} exists, can be written to and has space; an old file is untouched"
        ) from error


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    # Through uint8, because numpy has no bfloat16; flattened first, because a 0-dim tensor has no other view.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file, without torch and without the tensors.

    FinetuneError for a pickle, a file that cannot be read and a header that does not describe its file.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise FinetuneError(
            f"{path}: is a pickle, and opening a pickle can run any code it contains\n"
            "    get the .safetensors version, or convert it on a machine you can afford to lose"
        )
    try:
        with open(path, "rb") as file:
            return _parse(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise FinetuneError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else error
        raise FinetuneError(
            f"{path}: is not a sound safetensors file: {why}\n"
            "    it is cut, damaged or of another type: fetch it again"
        ) from error


def _parse(file, size: int) -> Header:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not pairs of texts")

    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"shape or offsets of {name!r} are not whole numbers")
        if begin != position or end < begin:
            raise ValueError(f"{name!r} should start at byte {position}, not at {begin}")
        if end - begin != math.prod(shape) * ITEM_BYTES.get(dtype, 0) and dtype in ITEM_BYTES:
            raise ValueError(f"{name!r} has {end - begin} bytes, which is not {dtype} {shape}")
        position = end
    if 8 + length + position != size:
        raise ValueError(f"its tensors end at byte {8 + length + position} of {size}")
    return Header(
        tensors={name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()},
        metadata=metadata,
        scalars={
            name: _scalar(file, 8 + length + entry["data_offsets"][0], entry["dtype"])
            for name, entry in header.items()
            if entry["shape"] == [] and entry["dtype"] in ("F16", "BF16", "F32", "F64")
        },
    )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} stands in it twice")
    return dict(pairs)


def _scalar(file, position: int, dtype: str) -> float:
    file.seek(position)
    data = file.read(ITEM_BYTES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return struct.unpack("<f", b"\0\0" + data)[0]
    return struct.unpack({"F16": "<e", "F32": "<f", "F64": "<d"}[dtype], data)[0]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, in their own dtype. FinetuneError as in `read_header`."""
    read_header(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise FinetuneError(f"{path}: is not a sound safetensors file: {error}") from error
