"""What the formats share: load, save, identify, and the checks on every adapter that comes in.

A format is a module with KINDS (of adapters, that it can hold), `reads(header)`, `decode(tensors, metadata, spec)` and
`encode(artifact, spec)`; decode(encode(a)) gives a's tensors back bit for bit. Nothing here imports torch before tensors
are wanted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import registry
from finetune.artifact import (
    WHOLE, Artifact, Header, data_of, fold_alpha, modules, read_header, read_tensors, weights_of, write_safetensors,
)
from finetune.errors import FinetuneError
from finetune.families._vae import from_ldm, is_vae, to_ldm
from finetune.formats import _tokens
from finetune.formats._dialects import place, translated
from finetune.formats._modules import kind_of, settle
from finetune.formats._tokens import is_bare, is_named, rows, shapes, token

if TYPE_CHECKING:  # both cost an import of torch
    from torch import Tensor

    from finetune.families.base import FamilySpec

CONTROL = "controlnet_cond_embedding.conv_in.weight"        # every control branch has it in diffusers' names
MOST_ALPHA = 2 ** 40        # a number of JSON may be larger than any float
DIFFUSERS_METADATA = "lora_adapter_metadata"  # peft's config, for diffusers: fatal in a file that has alphas


def load(path: str | Path, spec: FamilySpec) -> Artifact:
    """Read an adapter in whatever format it is. FinetuneError if none reads it or it is of another family."""
    path = weights_of(path)
    header = read_header(path)
    try:
        facts = identify(header)
        if facts["family"] not in (None, spec.name):
            raise FinetuneError(f"is for {facts['family']}, and the base is {spec.name}: their layers differ")
        said = header.metadata if facts["kind"] != "embedding" else {"ss_output_name": token(path)} | header.metadata
        said = said | _config_beside(Path(path), header)
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


def plain(header: Header) -> Header:
    """The header of the same file under the names of `_dialects`."""
    names = {name: place(name) or name for name in header.tensors}
    return Header({names[name]: facts for name, facts in header.tensors.items()}, header.metadata,
                  {names.get(name, name): value for name, value in header.scalars.items()})


def _config_beside(path: Path, header: Header) -> dict[str, str]:
    """What peft says of its adapter_model.safetensors in a file beside it: its alpha, above all."""
    config = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not config.is_file():
        return {}
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
        parts = {name.partition(".")[0] for name in plain(header).tensors}
        said = {f"{part}.{key}": value for part in sorted(parts) for key, value in fields.items()}
        return {DIFFUSERS_METADATA: json.dumps(said)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise FinetuneError(f"its {config.name} cannot be read: {error}") from None


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
    for (component, path), roles in modules(translated(tensors)).items():
        stem = f"{parts[component]}.{path}"
        settled = settle(stem, roles, partial(_alpha, configs.get(component, {}), path))
        result |= {f"{stem}.{role}": tensor for role, tensor in settled.items()}
    kept = {key: value for key, value in metadata.items() if key != DIFFUSERS_METADATA}
    return Artifact(kind_of(result), spec.name, fold_alpha(result), kept)


def _alpha(config: dict, path: str, rank: int) -> float:
    """What peft's config of a part says; the rule is peft's."""
    patterns = config.get("alpha_pattern", {}).items()
    matching = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", path))
    value = next(matching, config.get("lora_alpha", config.get("alpha", rank)))
    return value * math.sqrt(rank) if config.get("use_rslora") else value


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


def peft_configs(metadata: Mapping[str, str]) -> dict[str, dict]:
    """{component: peft's LoraConfig as a dict} from a file's metadata. FinetuneError if it makes no sense."""
    try:
        configs: dict[str, dict] = {}
        for key, value in json.loads(metadata.get(DIFFUSERS_METADATA, "{}")).items():
            component, _, field = key.partition(".")
            configs.setdefault(component, {})[field] = value
        for config in configs.values():
            if not (isinstance(config.get("r", 1), int) and isinstance(config.get("rank_pattern", {}), dict)):
                raise TypeError("a rank that is no number")
            alphas = config.get("alpha_pattern", {}) | {"": config.get("lora_alpha", config.get("alpha", 1))}
            for pattern, alpha in alphas.items():
                if re.search(r"[^\w.^$|()\\*-]", pattern) or pattern.count("*") > 2 or "(" in pattern:
                    raise ValueError(f"the pattern {pattern!r}")        # one from outside that could take for ever
                re.compile(pattern)
                if not (isinstance(alpha, (int, float)) and abs(alpha) <= MOST_ALPHA):
                    raise TypeError(f"an alpha of {alpha!r}")
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise FinetuneError(f"its {DIFFUSERS_METADATA} is not what diffusers writes: {error}") from error
    return configs


def number(value: float) -> int | float:
    """8 for 8.0, as other tools write it."""
    return int(value) if value.is_integer() else value


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


# What a file is, by the first pattern that any of its tensors' names contains: pattern, kind, format if none here reads it.
_KINDS = (
    (r"\.dora_scale$", "dora", None),
    (r"\.hada_w1_", "loha", None),
    (r"\.lokr_w", "lokr", None),
    (r"\.oft_(blocks|R)\b", "oft", "peft"),
    (r"\.diff(_b)?$", "difference", None),
    (r"\.lora_(down|up|A|B)\b|[._]lora\.(down|up)\.|\.lora_linear_layer\.", "lora", None),
    (r"^(emb_params|clip_l|clip_g)$", "embedding", "webui"),
    (r"^controlnet_cond_embedding\.", "control", "diffusers"),
    (r"^model\.diffusion_model\.", "checkpoint", "single_file"),
    (r"^first_stage_model\.|^(encoder\.down|decoder\.up)\.\d", "vae", "single_file"),
    (r"^(encoder\.down|decoder\.up)_blocks\.", "vae", "diffusers"),
    (r"^(down|up)_blocks\.\d+\.(attentions|resnets)\.", "unet", "diffusers"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.", "text encoder", "transformers"),
)
_PARTS = {
    "lora_unet": "denoiser", "unet": "denoiser", "transformer": "denoiser", "lora_transformer": "denoiser",
    "lora_te": "text", "lora_te1": "text", "text_encoder": "text",
    "lora_te2": "text_2", "text_encoder_2": "text_2", "text_encoder_3": "text_3",
}
_FAMILY_OF_VERSION = {
    "sd_v1": "sd1", "sd_v2": "sd2", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux",
    "stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3", "sd_x4_upscaler": "upscaler", "stable-diffusion-x4-upscaler": "upscaler",
}
_FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
WIDTHS_OF_SD3 = {1536, 2432}        # of the medium and the large models; FLUX has the same names, and 3072
# One tensor of every adapted module. The first group: those whose first axis is the rank, and whose second the input.
_ONE = re.compile(r"[._](lora_down|lora_A|lora\.down|lora_linear_layer\.down|hada_w1_b)\b|\.(lokr_w1(_a)?|oft_blocks|diff)$")


def identify(header: Header) -> dict:
    """What a header says: kind, format, family (None when unknown), ranks, alphas, modules by part."""
    as_given, header = header, plain(header)
    names = header.tensors
    kind, format_name = next(
        ((kind, form) for pattern, kind, form in _KINDS if any(re.search(pattern, name) for name in names)),
        (None, None),
    )
    if kind is None and is_named(shapes(header)):
        kind, format_name = "embedding", "diffusers"
    readers = (name for name in registry.names("formats") if registry.find("formats", name).reads(as_given))
    format_name = next(readers, format_name)
    ones = {name: found for name in names if (found := _ONE.search(name))}
    prefixes = Counter(re.match(r"lora_[^_]+|[^.]*", name)[0] for name in ones)
    parts: Counter[str] = Counter()
    for prefix, count in prefixes.items():
        parts[_PARTS.get(prefix, prefix)] += count
    return {
        "kind": kind,
        "format": format_name,
        "family": _family(header),
        "ranks": sorted({names[name][1][0] for name, found in ones.items() if found[1] and names[name][1]}),
        "alphas": _alphas(header),
        "modules": dict(sorted(parts.items())),
    }


def family_of(path: str | Path, said: str | None) -> str:
    """The family that a user said, or that the file's header tells; sd1 where neither does."""
    return said or identify(read_header(path))["family"] or "sd1"


def contradictions(header: Header) -> list[str]:
    """What the metadata say and the tensors do not. Of a small base's shapes nothing is known."""
    facts, shaped, said, found = identify(header), _family_of_shapes(plain(header)), header.metadata, []
    # Tokens of SDXL and of SD 3 look the same.
    if shaped and shaped != facts["family"] and not (facts["family"] == "sd3" and "clip_g" in header.tensors):
        found.append(f"its metadata say {facts['family']}, but its shapes are those of {shaped}")
    if facts["kind"] != "lora":
        return found
    ranks = [said.get("ss_network_dim", ""), *(str(config["r"]) for config in peft_configs(said).values()
                                               if "r" in config and not config.get("rank_pattern"))]
    found += [f"its metadata say rank {rank}, but its tensors have {_few(facts['ranks'])}" for rank in ranks
              if re.fullmatch(r"\d{1,9}", rank) and facts["ranks"] and int(rank) not in facts["ranks"]]
    # That of rsLoRA in LyCORIS is another in the file, and an alpha in half precision is a little off.
    alpha = said.get("ss_network_alpha", "")
    alphas = [value for name, value in header.scalars.items() if name.endswith(".alpha")]
    if re.fullmatch(r"\d+(\.\d+)?", alpha) and alphas and "rs_lora" not in said.get("ss_network_args", "") and not any(
            math.isclose(float(alpha), own, rel_tol=1e-2) for own in alphas):
        found.append(f"its metadata say alpha {alpha}, but its tensors have {_few(facts['alphas'])}")
    return found


def _few(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:5])


def _family(header: Header) -> str | None:
    """Metadata first: a width alone misleads for a small base."""
    said = header.metadata
    if "finetune.family" in said:
        return said["finetune.family"]
    version = said.get("ss_base_model_version") or said.get("modelspec.architecture") or ""
    known = next((family for start, family in _FAMILY_OF_VERSION.items() if version.startswith(start)), None)
    return known or _family_of_shapes(header)


def _family_of_shapes(header: Header) -> str | None:
    joint = {shape[-1] for name, (_, shape) in header.tensors.items()
             if re.fullmatch(r"transformer\.transformer_blocks\.\d+\.(attn|ff)[._].*lora_A", name) and shape}
    if any(name.startswith("transformer.joint_blocks.") for name in header.tensors) or joint & WIDTHS_OF_SD3:
        return "sd3"
    keys = [name for name in header.tensors if re.search(r"\.attn2\.to_k\.", name)]
    wide = [key for key in keys if (found := _ONE.search(key)) and found[1] or key.endswith(("to_k.weight", "to_k.diff"))]
    found = [header.tensors[key][1] for key in wide]
    if is_bare(header.tensors) or is_named(shapes(header)):
        found = [(2048,)] if "clip_g" in header.tensors else [*shapes(header).values()]
    family = next(filter(None, (_FAMILY_OF_WIDTH.get(shape[-1]) for shape in found if shape)), None)
    # Of SD 2 the lowest level has no attention; of the upscaler, as wide, the highest has none.
    lowest = any(re.search(r"(down_blocks\.3|up_blocks\.0)\.attentions", key) for key in keys)
    return "upscaler" if family == "sd2" and lowest else family


def _alphas(header: Header) -> list[int | float]:
    values = {value for name, value in header.scalars.items() if name.endswith(".alpha")}
    for config in peft_configs(header.metadata).values():
        values |= {config["lora_alpha"]} if "lora_alpha" in config else set()
        values |= set(config.get("alpha_pattern", {}).values())
    return [number(float(value)) for value in sorted(values)]
