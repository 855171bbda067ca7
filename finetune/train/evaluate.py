"""The same prompts and seeds from a base and from adapters on it, in numbers: each with its interval, and every two compared.

A metric asks for what it NEEDS: `training` pictures, `plain` prompts, two `seeds` of each prompt, `many` pictures."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from PIL import Image
from typing_extensions import TypedDict     # pydantic wants this one

from finetune import __version__, registry
from finetune.data import encode
from finetune.data.index import build
from finetune.data.pictures import Reading
from finetune.errors import FinetuneError, refuse
from finetune.metrics._eye import Network, Pixels
from finetune.metrics._intervals import LEVEL, RESAMPLES, facts
from finetune.metrics.base import Album, Measured, Painted, album
from finetune.recipe.data import Images
from finetune.train import adapters
from finetune.train.jobs import Job
from finetune.train.preview import grid

MANY = 50           # pictures below which a distance of sets says next to nothing
SHOWN = 8           # rows of a sheet
MISSING = {"training": "it compares with training pictures: give them with --images",
           "plain": "it wants plain prompts: give them with --plain",
           "seeds": "it compares pictures of one prompt: give --seeds 2 or more",
           "many": f"it compares whole sets: at least {MANY} pictures have to be sampled, and as many be in --images"}


@dataclass(frozen=True)
class Subject:
    """Who paints: the base with these adapters on."""

    name: str
    files: list[tuple[Path, float]]     # and how often each counts


@dataclass(frozen=True)
class Metric:
    word: str
    module: ModuleType
    model: str


class Number(TypedDict):
    value: float | None
    low: float | None
    high: float | None


class Numbers(TypedDict):
    """Of a metric: of each subject, and of each two."""

    better: Literal["higher", "lower", ""]
    of: dict[str, Number]
    differences: dict[str, Number]


class Result(TypedDict):
    """What is read of eval.json."""

    metrics: dict[str, Numbers]


def subjects(words: Sequence[str]) -> list[Subject]:
    """The base, then each FILE[:STRENGTH] or run folder, all under different names. Raises FinetuneError."""
    found = [Subject("base", [])]
    for word in words:
        if Path(word).is_dir():
            one = of_run(Path(word))
        else:
            path, strength = adapters.named(word)
            one = Subject(path.stem if strength == 1 else f"{path.stem}-strength{strength:.15g}", [(path, strength)])
        taken = {other.name for other in found}
        names = [one.name, *(f"{one.name}-{number}" for number in range(2, len(words) + 2))]
        found.append(Subject(next(name for name in names if name not in taken), one.files))
    return found


def of_run(folder: Path) -> Subject:
    """A run with all that it trained, each in its first format."""
    files = [file for file in sorted((folder / "adapter").glob("*.safetensors")) if not file.stem.endswith(".diffusers")]
    if not files:
        raise FinetuneError(f"{folder}: holds no adapter/*.safetensors; a run that is done has one. A whole model is a --base")
    return Subject(folder.resolve().name, [(file, 1.0) for file in files])


def metrics(words: Sequence[str], given: set[str], place: str = "--metric ") -> list[Metric]:
    """Those that are named, NAME[:MODEL], at that place; when none is, all that what is `given` allows. FinetuneError."""
    found, problems = [], []
    for word in words or registry.names("metrics"):
        name, _, model = word.partition(":")
        module = registry.find("metrics", name)
        missing = [MISSING[need] for need in sorted(module.NEEDS - given)] if words else []
        if words and not (model or module.MODEL):
            missing.append("it has no usual model: give it a file, as NAME:FILE")
        problems += [f"{place}{word}: {text}" for text in missing]
        if words or module.MODEL and module.NEEDS <= given:
            found.append(Metric(name, module, model or module.MODEL))
    refuse(problems)
    if twice := [name for name, count in Counter(metric.word for metric in found).items() if count > 1]:
        raise FinetuneError(f"{place}{twice[0]}: named twice")
    return found


def eyes(wanted: Sequence[Metric], prompts: list[str]) -> dict[str, object]:
    """What the metrics look with, each network loaded once. Raises FinetuneError for one that cannot be, or cannot read."""
    found = {}
    for metric in wanted:
        if metric.model not in found:
            found[metric.model] = metric.module.eye(metric.model) if hasattr(metric.module, "eye") else \
                Pixels() if metric.model == Pixels.path else Network(metric.model)
        if hasattr(metric.module, "check"):
            metric.module.check(prompts, found[metric.model])
    return found


def training(place: str) -> Album:
    """Training pictures. Raises FinetuneError for those that cannot be read."""
    index = build([Images(path=place)], Reading(), None, lambda line: None, True, "--images")
    encode.refuse([note for note in index.notes if note.fatal])
    return Album([index.name(i) for i in range(len(index))], index.read)


def places(folder: Path, jobs: Sequence[Job]) -> list[Path]:
    return [folder / f"{number:04d}-seed{job.seed}.png" for number, job in enumerate(jobs)]


def painted(jobs: Sequence[Job], files: dict[str, list[Path]], plain: dict[str, list[Path]],
            learned: Album | None) -> dict[str, Painted]:
    """What each subject has painted; the base is its own measure of drift, and so has none."""
    base = album(plain["base"]) if plain else None
    return {name: Painted([job.prompt for job in jobs], album(some), learned,
                          album(plain[name]) if plain and name != "base" else None, base) for name, some in files.items()}


def measure(wanted: Sequence[Metric], seen: dict[str, object], shown: dict[str, Painted]) -> dict[str, dict]:
    """Measure → `{better, model, of: {subject: Measured}}`."""
    found: dict[str, dict] = {}
    for metric in wanted:
        for name, one in shown.items():
            if "plain" in metric.module.NEEDS and one.plain is None:
                continue
            for measure, measured in metric.module.measure(one, seen[metric.model]).items():
                about = {"better": metric.module.BETTER, "model": metric.model, "of": {}}
                found.setdefault(measure, about)["of"][name] = measured
    return found


def numbers(found: dict[str, dict]) -> dict[str, dict]:
    """The same in numbers, as eval.json has it: value, low and high of each subject, and of each difference `b − a`."""
    return {measure: {"better": about["better"], "model": about["model"],
                      "of": {name: facts(one) for name, one in about["of"].items()},
                      "differences": {f"{b} − {a}": facts(about["of"][b], about["of"][a])
                                      for a, b in combinations(about["of"], 2)}} for measure, about in found.items()}


def table(found: dict[str, dict], width: int = 80) -> str:
    """At 80 columns. A difference whose interval leaves out 0 is said to be one."""
    room = width - 42
    lines = [f"{'':<{room + 2}}{'value':>9}   {LEVEL:.0%} interval"]
    for measure, about in found.items():
        lines.append(measure + {"higher": "  (higher is better)", "lower": "  (lower is better)", "": ""}[about["better"]])
        for name, one in (about["of"] | about["differences"]).items():
            ends = f"{_told(one['low'])} … {_told(one['high'])}" if one["low"] is not None else ""
            verdict = _verdict(one, about["better"]) if name in about["differences"] else ""
            short = name if len(name) <= room else f"{name[:room - 1]}…"
            lines.append(f"  {short:<{room}}{_told(one['value']):>9}   {ends:<19} {verdict}".rstrip())
    return "\n".join(lines)


def _told(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _verdict(one: dict, better: str) -> str:
    if one["low"] is None or one["low"] <= 0 <= one["high"]:
        return ""
    return "differs" if not better else "better" if (one["low"] > 0) == (better == "higher") else "worse"


def sheet(jobs: Sequence[Job], files: dict[str, list[Path]]) -> Image.Image:
    """A few of the jobs, spread over all, as each subject painted them."""
    rows = np.unique(np.linspace(0, len(jobs) - 1, min(SHOWN, len(jobs))).round().astype(int))
    return grid([[Image.open(some[row]) for some in files.values()] for row in rows],
                [f"{jobs[row].prompt} · seed {jobs[row].seed}" for row in rows], list(files))


def nearest(measured: dict[str, Measured], files: dict[str, list[Path]], learned: Album) -> tuple[list[dict], Image.Image]:
    """Of each subject the pictures nearest to a training picture: as facts, and beside it."""
    each = max(1, math.ceil(SHOWN / len(measured)))
    found = [(name, *pair) for name, one in measured.items() for pair in one.nearest[:each]]
    said = [{"of": name, "picture": f"{name}/{files[name][i].name}", "training": learned.names[j], "cosine": cosine,
             "bits": bits} for name, i, j, cosine, bits in found]
    rows = [[Image.open(files[name][i]), learned[j]] for name, i, j, _, _ in found]
    labels = [f"{one['picture']} · {Path(one['training']).name} · cosine {one['cosine']:.3f}, {one['bits']} bits differ"
              for one in said]
    return said, grid(rows, labels, ["sampled", "nearest in training"])


def result(base: str, who: Sequence[Subject], jobs: Sequence[Job], plain: Sequence[Job], numbers: dict[str, dict],
           copies: list[dict]) -> dict:
    """All of eval.json; files by their names alone."""
    return {"base": base, "subjects": {one.name: {file.name: strength for file, strength in one.files} for one in who},
            "pictures": len(jobs), "prompts": len({job.prompt for job in jobs}), "plain": len(plain),
            "sampling": {key: value for key, value in jobs[0].facts().items() if key in ("steps", "guidance", "size")},
            "interval": f"{LEVEL:.0%}, over prompts × seeds: expanded percentile bootstrap, {RESAMPLES} resamples; of shares "
                        "Wilson's, and Newcombe's of their differences. Differences are paired",
            "metrics": numbers, "nearest": copies, "version": __version__}
