"""A checkpoint: trained parameters, their average, optimizer state and the step, as safetensors and JSON.

It is written into a staging folder, synced, sealed by a manifest with sizes and hashes, and renamed: under its name it
is complete or it is not there. Random state is not in it, because there is none (see diffusion/noise.py).
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from finetune.artifact import read_tensors, write_safetensors
from finetune.disk import sync, write_json, writing
from finetune.errors import FinetuneError
from finetune.header import read_header
from finetune.runfolder import RunFolder

MANIFEST = "manifest.json"
DAMAGED = (FinetuneError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what `load` raises


@dataclass(frozen=True)
class State:
    step: int                               # optimizer steps done
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    plain: dict                             # what of the state is no tensor, as JSON can hold it
    ema: dict[str, Tensor] | None


def save(folder: RunFolder, state: State, keep_last: int, keep_every: int | None = None) -> Path:
    """Write the checkpoint, then prune older ones but for every `keep_every` steps. A failure leaves the earlier checkpoints
    untouched."""
    final = folder.checkpoint(state.step)
    staging = final.with_name(f".{final.name}.part")
    if final.exists():      # complete, or it would not have its name; and a step has one outcome
        return final
    with writing(f"the checkpoint {final}", "; earlier checkpoints are untouched"):
        staging.mkdir(parents=True)
        write_safetensors(staging / "parameters.safetensors", state.parameters, {})
        plain = json.dumps(state.plain, sort_keys=True)
        write_safetensors(staging / "optimizer.safetensors", state.optimizer, {"plain": plain})
        if state.ema is not None:
            write_safetensors(staging / "ema.safetensors", state.ema, {})
        if folder.metrics.exists():     # the checkpoint must not outlive its log
            sync(folder.metrics)
        files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(staging.iterdir())}
        write_json(staging / MANIFEST, {"step": state.step, "run": folder.fingerprint(), "files": files})
        sync(staging)
        os.replace(staging, final)
        sync(final.parent)
        for old in folders(folder)[keep_last:]:
            if not keep_every or step(old) % keep_every:
                os.replace(old, doomed := old.with_name(f".{old.name}.part"))      # gone as a whole, wherever a kill falls
                shutil.rmtree(doomed)
    return final


def newest(folder: RunFolder, say, tidy: bool) -> State | None:
    """The newest checkpoint whose every byte is as it was written. A damaged one is named and, by the one process that
    may `tidy`, set aside."""
    for path in folders(folder):
        try:
            return load(path)
        except DAMAGED as e:
            names = (f"damaged-{path.name}{number}" for number in ["", *(f"-{n}" for n in range(2, 10**6))])
            aside = next(aside for aside in map(path.with_name, names) if not aside.exists())
            say(f"checkpoint {path.name} is damaged ({e}); set aside as {aside.name}")
            if tidy:
                path.rename(aside)
    return None


def load(path: Path) -> State:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest["step"] != step(path):
        raise ValueError(f"it is of step {manifest['step']}")
    own = RunFolder(path.parent.parent, "").fingerprint()
    if manifest.get("run", own) != own:     # those of the first version do not say
        raise ValueError("it is of another run")
    files = {name: manifest["files"][name] for name in ("parameters.safetensors", "optimizer.safetensors", *manifest["files"])}
    for name, seal in files.items():
        if (path / name).stat().st_size != seal["size"] or _sha256(path / name) != seal["sha256"]:
            raise ValueError(f"{name} is not what was written")
    return State(
        manifest["step"], read_tensors(path / "parameters.safetensors"), read_tensors(path / "optimizer.safetensors"),
        json.loads(read_header(path / "optimizer.safetensors").metadata["plain"]),
        read_tensors(path / "ema.safetensors") if "ema.safetensors" in manifest["files"] else None)


def folders(folder: RunFolder) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((p for p in folder.checkpoints.glob("step-*") if p.name[5:].isdecimal()), key=step, reverse=True)


def step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(f.read()).hexdigest()
