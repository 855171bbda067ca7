"""The proof that comes with an adapter: the written file is opened again, and gives what was trained.

The probe is one call of the denoiser at a fixed latent, text and timestep. `expected` is its output with the adapter at
strength 0.5 and 1: from the training model at the end of `train`, from our own merge in `finetune verify`. A LoRA is loaded
by diffusers; other kinds, which diffusers does not load, are merged by ourselves and held against the training model.
"""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.artifact import Artifact, modules
from finetune.change import core
from finetune.diffusion import noise
from finetune.families import base as families
from finetune.formats import base as formats
from finetune.train.preview import resting

STRENGTHS = (0.5, 1.0)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}   # relative; half formats round every layer
NAME = "verified"


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    found: str


def verify(path: Path, family, expected: dict[float, Tensor] | None = None) -> list[Check]:
    """Every check of one file on one base. Without `expected`, the probe's outputs with the file merged by ourselves.

    Raises FinetuneError when the file is no adapter, or not one of this family."""
    artifact = formats.load(path, family.spec)
    checks, misfits = alone(artifact), families.misfits(family.parts, artifact)
    checks.append(Check("fits the base", not misfits, "; ".join(misfits[:3]) or "every module"))
    if not all(check.passed for check in checks):
        return checks
    if artifact.kind == "lora":
        expected = expected or {s: merged(family, artifact, s) for s in STRENGTHS}
        with warnings.catch_warnings():     # peft remarks that the file comes beside what was trained, and goes again
            warnings.simplefilter("ignore")
            checks += by_diffusers(path, family, expected)
    elif expected:
        checks += [compared(family, f"merged by finetune at {s:g}", merged(family, artifact, s), wanted)
                   for s, wanted in expected.items()]
    return checks


def alone(artifact: Artifact) -> list[Check]:
    """What can be said of an adapter without its base."""
    changes = modules(artifact.tensors).values()
    finite = sum(all(bool(t.isfinite().all()) for t in (*change.values(), core(change))) for change in changes)
    moved = sum(bool(core(change).any()) for change in changes)
    return [Check("finite", finite == len(changes), f"{finite} of {len(changes)} changes"),
            Check("not zero", moved > 0, f"{moved} of {len(changes)} changes")]


def by_diffusers(path: Path, family, expected: dict[float, Tensor]) -> list[Check]:
    """The probe with the file loaded by diffusers at each strength, against what is expected there."""
    pipeline, denoiser = family.pipeline(), family.parts["denoiser"]
    checks = []
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=NAME)
        for strength, wanted in expected.items():
            pipeline.set_adapters([NAME], [strength])
            checks.append(compared(family, f"diffusers at strength {strength:g}", probe(family), wanted))
    except (ValueError, RuntimeError, KeyError) as e:
        checks.append(Check("diffusers", False, f"its loader refuses the file: {str(e).splitlines()[0]}"))
    finally:
        if NAME in getattr(denoiser, "peft_config", {}):
            pipeline.delete_adapters([NAME])
    return checks


def compared(family, name: str, found: Tensor, wanted: Tensor) -> Check:
    limit = TOLERANCE[next(family.parts["denoiser"].parameters()).dtype]
    error = ((found - wanted).norm() / wanted.norm()).item()
    return Check(name, error <= limit, f"relative difference {error:.1e}, at most {limit:.0e}")


def merged(family, artifact, strength: float) -> Tensor:
    with families.merged(family.parts, [(artifact, strength)]):
        return probe(family)


@torch.no_grad()
def probe(family) -> Tensor:
    """The denoiser's output at a fixed point, as the family stands."""
    denoiser = family.parts["denoiser"]
    side = min(denoiser.config.sample_size, 32)
    x = noise.normal((denoiser.config.in_channels, side, side), 0, [0, 1], "verify").to(denoiser.device)
    t = torch.tensor([family.path.steps // 10, family.path.steps // 2], device=denoiser.device)
    with resting(family.parts):
        return family.denoise(x, t, family.encode_text(["a picture", "a red circle"]), torch.zeros(2, 6, device=x.device))


def table(checks: list[Check]) -> str:
    return "\n".join(f"  {'ok  ' if check.passed else 'FAIL'}  {check.name:<28} {check.found}" for check in checks)


def as_json(results: dict[str, list[Check]]) -> str:
    return json.dumps({name: [asdict(check) for check in checks] for name, checks in results.items()}, indent=1) + "\n"
