"""One file with a whole model under the names it was published with, which every tool reads; a VAE under those of LDM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.artifact import Artifact, published, write_safetensors
from finetune.errors import FinetuneError
from finetune.families._identify import LAYOUTS
from finetune.formats.base import ldm_vae
from finetune.header import Header

if TYPE_CHECKING:  # both cost an import of torch
    import torch
    from torch import Tensor, nn

    from finetune.families.base import FamilySpec

KINDS = ("full", "vae")     # a VAE is read by kohya: it is the same file
# What a file says that a model predicts; one on rectified flow says nothing.
SAID = {"epsilon": "epsilon", "v_prediction": "v", None: ""}


def reads(header: Header) -> bool:
    return any(name.startswith("model.diffusion_model.") for name in header.tensors)


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: FamilySpec) -> Artifact:
    """A whole model has nothing to add to another: FinetuneError."""
    raise FinetuneError("it is a whole model and no adapter: give it as the base")


def encode(artifact: Artifact, spec: FamilySpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    assert artifact.kind == "vae", "a whole model is written from its parts, see `write`"
    return ldm_vae(artifact, spec)


def check(family) -> None:
    """Raise FinetuneError for a family whose models are in no single file, and for what none can say of its noising."""
    if (name := family.spec.name) not in LAYOUTS:
        raise FinetuneError(f"single_file: cannot hold a model of {name}; {', '.join(LAYOUTS)} can be written so: "
                            "write a diffusers folder")
    if (prediction := family.scheduler.config.get("prediction_type")) not in SAID:
        raise FinetuneError(f"single_file: cannot say of a model that it predicts {prediction}: write a diffusers folder")


def write(family, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """The family in one file, its weights in `dtype`, all or nothing. FinetuneError for what the original has no place for,
    and when the disk refuses."""
    import torch

    from finetune.families import _original

    check(family)
    tensors = {}
    for part, module in family.parts.items():
        kind, prefix = LAYOUTS[family.spec.name][family.spec.components[part]]
        ours = {published(name): t for name, t in module.to(dtype).state_dict().items()}
        tensors |= {prefix + name: t for name, t in _original.write(ours, _original.rows(kind, ours))}
    config = family.scheduler.config
    v = config.get("prediction_type") == "v_prediction"
    said = {"modelspec.prediction_type": SAID[config["prediction_type"]]} if "prediction_type" in config else {}
    # What ComfyUI and Forge know an SDXL by that predicts v, and one whose last step is nothing but noise.
    marks = {"v_pred": v and family.spec.name != "sd2", "ztsnr": bool(config.get("rescale_betas_zero_snr"))}
    tensors |= {mark: torch.empty(0) for mark, there in marks.items() if there}
    write_safetensors(path, tensors, dict(metadata) | said | {
        "finetune.kind": "full", "finetune.family": family.spec.name, "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.spec.architecture})


def read(path: Path, family) -> dict[str, nn.Module]:
    """The parts of such a file as new modules like the family's own. FinetuneError when one of them is not whole."""
    from finetune.families import _single

    found = {}
    for part, own in family.parts.items():
        place = LAYOUTS[family.spec.name][family.spec.components[part]]
        config = own.config.to_dict() if hasattr(own.config, "to_dict") else dict(own.config)
        found[part] = _single.load(str(path), place, type(own), config, own.dtype)
    return found
