"""What the formats share: load, save, and the checks on every adapter that comes in.

A format is a module with KINDS (of adapters, that it can hold), `reads(header)`, `decode(tensors, metadata, spec)` and
`encode(artifact, spec)`; decode(encode(a)) gives a's tensors back bit for bit. Nothing here imports torch before tensors
are wanted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import registry
from finetune.artifact import WHOLE, Artifact, data_of, fold_alpha, modules, read_tensors, weights_of, write_safetensors
from finetune.errors import FinetuneError
from finetune.families._vae import from_ldm, is_vae, to_ldm
from finetune.formats import _tokens
from finetune.formats._configs import DIFFUSERS_METADATA, alphas_of, beside, peft_configs
from finetune.formats._dialects import place, translated
from finetune.formats._identify import identify, number
from finetune.formats._modules import kind_of, settle
from finetune.formats._tokens import is_bare, is_named, token
from finetune.header import read_header

if TYPE_CHECKING:  # both cost an import of torch
    from torch import Tensor

    from finetune.families.base import FamilySpec

CONTROL = "controlnet_cond_embedding.conv_in.weight"        # every control branch has it in diffusers' names


def load(path: str | Path, spec: FamilySpec) -> Artifact:
    """Read an adapter in whatever format it is. FinetuneError if none reads it or it is of another family."""
    path = weights_of(path)
    header = read_header(path)
    try:
        facts = identify(header)
        if facts["family"] not in (None, spec.name):
            raise FinetuneError(f"is for {facts['family']}, and the base is {spec.name}: their layers differ")
        said = header.metadata if facts["kind"] != "embedding" else {"ss_output_name": token(path)} | header.metadata
        said = said | beside(Path(path), header)
        for name in registry.names("formats"):
            module = registry.find("formats", name)
            if module.reads(header):
                return module.decode(read_tensors(path), said, spec)
        raise FinetuneError(
            f"no format reads it: kind {facts['kind'] or 'unknown'}, keys {_some(list(header.tensors)) or 'none'}\n"
            f"    formats: {', '.join(registry.names('formats'))}; `finetune inspect` says more about it"
        )
    except FinetuneError as error:
        raise FinetuneError(f"{path}: {error}") from error


def save(artifact: Artifact, path: str | Path, format_name: str, spec: FamilySpec) -> None:
    """Write an adapter in one format. FinetuneError for a format that is unknown or cannot hold it, or a full disk."""
    check_kind(format_name, artifact.kind)
    tensors, metadata = registry.find("formats", format_name).encode(artifact, spec)
    # Of the tensors alone: what A1111 and its relatives know an adapter by, and would else compute when they first see it.
    found = hashlib.sha256()
    for data in data_of(tensors):
        found.update(data)
    known = {"sshs_model_hash": found.hexdigest(), "modelspec.hash_sha256": f"0x{found.hexdigest()}"}
    write_safetensors(path, tensors, metadata | known)


def check_kind(format_name: str, kind: str, field: str = "") -> None:
    """Raise FinetuneError, about this field of the recipe, when adapters of this kind cannot be written in the format."""
    able = [name for name in registry.names("formats") if kind in registry.find("formats", name).KINDS]
    if registry.check("formats", format_name) not in able:
        lost = {"dora": "the magnitudes", "difference": "whole differences, of weights, biases and norms,"}
        raise FinetuneError(f"{field}{format_name} cannot hold adapters of the kind {kind}; {', '.join(able)} can "
                            f"({lost.get(kind, 'all of it')} would be lost)")


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: FamilySpec) -> Artifact:
    """What is in a file of one part: a VAE in either naming, a control branch, a token, or else an adapter, see `gather`."""
    if is_vae(tensors, ldm=True):
        return whole_part("vae", from_ldm(tensors), metadata, spec)
    if is_vae(tensors, ldm=False):
        return whole_part("vae", tensors, metadata, spec)
    if CONTROL in tensors:
        return whole_part("control", tensors, metadata, spec)
    if is_bare(tensors) or is_named({name: t.shape for name, t in tensors.items()}):
        return _tokens.decode(tensors, metadata, spec)
    return gather(tensors, metadata, spec)


def gather(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: FamilySpec) -> Artifact:
    """The adapter in a file's tensors, whichever tool's names they have. An alpha that has no tensor stands in
    `lora_adapter_metadata`; without that the scale is 1.

    FinetuneError for a key without a place, two keys for one place, and as in `settle`.
    """
    parts = {component: part for part, component in spec.components.items()}
    lost = [name for name in tensors if (place(name) or "").partition(".")[0] not in parts]
    if lost:
        raise FinetuneError(f"{_some(lost)}: no name of an adapter for {spec.name}")
    configs, result = peft_configs(metadata), {}
    alphas = {component: alphas_of(configs.get(component, {})) for component in parts}
    for (component, path), roles in modules(translated(tensors)).items():
        stem = f"{parts[component]}.{path}"
        settled = settle(stem, roles, partial(alphas[component], path))
        result |= {f"{stem}.{role}": tensor for role, tensor in settled.items()}
    kept = {key: value for key, value in metadata.items() if key != DIFFUSERS_METADATA}
    return Artifact(kind_of(result), spec.name, fold_alpha(result), kept)


def whole_part(part: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: FamilySpec) -> Artifact:
    """The artifact of the weights of a VAE or a control branch in the names of diffusers."""
    return Artifact(part, spec.name, {f"{part}.{name}": t for name, t in tensors.items()}, dict(metadata))


def bare(artifact: Artifact) -> dict[str, Tensor]:
    """Its weights in the names of diffusers."""
    return {name.removeprefix(f"{artifact.kind}."): t for name, t in artifact.tensors.items()}


def ldm_vae(artifact: Artifact, spec: FamilySpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) in the names of LDM, bare: the one file of a VAE that every tool reads."""
    return to_ldm(bare(artifact)), common_metadata(artifact, spec)


def common_metadata(artifact: Artifact, spec: FamilySpec) -> dict[str, str]:
    """The metadata of a file in any format: the artifact's own, and what A1111, Forge and SD.Next sort and label files by."""
    own = {key: value for key, value in artifact.metadata.items() if key not in (DIFFUSERS_METADATA, "sshs_legacy_hash")}
    size = None if artifact.kind in (*WHOLE, "embedding") else rank_and_alpha(artifact.tensors)
    ranked = {"ss_network_dim": str(size[0]), "ss_network_alpha": str(number(size[1]))} if size else {}
    what = {"vae": "vae", "embedding": "textual-inversion", "control": "controlnet"}.get(artifact.kind, "lora")
    return own | ranked | {
        "finetune.kind": artifact.kind,
        "finetune.family": artifact.family,
        "ss_base_model_version": spec.base_version,
        "ss_v2": str(spec.base_version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{spec.architecture}/{what}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": own.get("modelspec.title", own.get("ss_output_name", f"{spec.name} {what}")),
    }


def rank_and_alpha(tensors: Mapping[str, Tensor]) -> tuple[int, float] | None:
    """The most frequent rank of canonical tensors, and the alpha that goes with it; None if they have no ranks."""
    pairs = Counter((module[role].shape[0], module["alpha"].item()) for module in modules(tensors).values()
                    for role in ("lora_A", "hada_w1_b") if role in module)
    return max(pairs, key=lambda pair: (pairs[pair], pair)) if pairs else None


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
