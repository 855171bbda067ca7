"""Adapters as a command names them, FILE[:STRENGTH], and a base with them on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune import tokens
from finetune.artifact import Artifact, weights_of
from finetune.errors import FinetuneError
from finetune.families import _control
from finetune.families import base as families
from finetune.formats import _tokens
from finetune.formats import base as formats


@dataclass(frozen=True)
class Adapter:
    """An adapter and how often it counts."""

    path: Path
    strength: float
    artifact: Artifact


def named(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH; of a folder with a control branch its file. Raises FinetuneError when there is no such file."""
    path, strength = Path(text), 1.0
    if not path.exists():
        head, _, tail = text.rpartition(":")
        try:
            path, strength = Path(head or text), finite(tail)
        except ValueError:
            pass
    if not weights_of(path).is_file():
        raise FinetuneError(f"--adapter {text}: there is no file {path}")
    return path, strength


def finite(text: str) -> float:
    """The number. Raises ValueError for what is none."""
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def load(words: list[tuple[Path, float]], family) -> list[Adapter]:
    """Those that were named, read. Raises FinetuneError for files that do not fit the base."""
    adapters = [Adapter(path, strength, formats.load(path, family.spec)) for path, strength in words]
    for each in adapters:
        check_finite(each.path, each.artifact)
        if misfits := families.misfits(family.parts, each.artifact):
            raise FinetuneError(f"--adapter {each.path}: does not fit this base: {'; '.join(misfits[:3])}")
        if each.artifact.kind == "embedding" and each.strength != 1:
            raise FinetuneError(f"--adapter {each.path}:{each.strength:g}: a learned token has no strength; prompts name it "
                                "or not")
    return adapters


def check_finite(path: Path, artifact: Artifact) -> None:
    """Raise FinetuneError for an adapter with numbers that are none."""
    if bad := [name for name, t in artifact.tensors.items() if not t.isfinite().all()]:
        raise FinetuneError(f"{path}: {len(bad)} of its tensors hold NaN or infinity, such as {bad[0]}: it is damaged, "
                            "or its training went wrong")


@contextmanager
def on(family, adapters: list[Adapter], factor: float = 1.0) -> Iterator[None]:
    """Inside, the base has the adapters at `factor` times their strength; at 0 it has no learned token either, and a control
    branch that adds nothing."""
    branches = [(each.artifact.tensors, each.strength * factor) for each in adapters if each.artifact.kind == "control"]
    words = {_tokens.token(each.path): _tokens.rows(each.artifact) for each in adapters if each.artifact.kind == "embedding"}
    weights = [(each.artifact, each.strength * factor) for each in adapters
               if each.artifact.kind not in ("embedding", "control") and each.strength * factor]
    with families.merged(family.parts, weights), tokens.added(family, words if factor else {}), \
            _control.added(family, branches):
        yield
