"""What to sample: one job a prompt, from the command line or from a file.

A file is text with a prompt a line (.txt), JSONL with an object a line, or YAML with a list of the same objects. What an
object leaves out is as the command line has it; a path in it is relative to the file.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from finetune.data.pictures import SUFFIXES
from finetune.errors import FinetuneError, refuse
from finetune.recipe.document import NotYaml, parse
from finetune.recipe.explain import explain
from finetune.recipe.words import Fields, Positive, Seed

Row = tuple[str, str, dict]     # where it stands, what comes before a key there, the object


def _size(value):
    """WxH → (height, width)."""
    if not isinstance(value, str):
        return value
    if not (sides := re.fullmatch(r"(\d{1,5})x(\d{1,5})", value)):
        raise ValueError("WIDTHxHEIGHT in pixels is needed, as in 512x768")
    return int(sides[2]), int(sides[1])


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text[:40]!r} is not text in UTF-8") from None
    return text


Words = Annotated[str, AfterValidator(_utf8)]
Size = Annotated[tuple[Positive, Positive], BeforeValidator(_size), PlainSerializer(lambda size: f"{size[1]}x{size[0]}")]
File = Annotated[Path, Field(strict=False), PlainSerializer(lambda path: path.name)]        # no private path is written down


class Job(Fields):
    """A picture to sample; as a row of a file, `count` of them for each image of a folder."""

    prompt: Words
    negative: Words = ""
    """What the picture should not show."""
    seed: Seed = 0
    """Of the first picture; the next has the next."""
    count: Positive = 1
    steps: Positive = 25
    guidance: Annotated[float, Field(ge=0)] = 5.0
    size: Size | None = None
    """(height, width) in pixels; the base's own if not given, or the shape of the image."""
    image: File | None = None
    """The picture to begin with, or a folder of such."""
    condition: File | None = None
    """The picture that a control branch follows, or a folder of such."""
    mask: File | None = None
    """White where the image is painted anew; with a folder of images a folder, with a mask of the same name for each."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """How much of the image is changed; 0.8 if not given, 1 inside a mask."""
    upscale: bool = False
    """Make the image larger, by as much as the base does."""

    @model_validator(mode="after")
    def _one_verb(self) -> "Job":
        for name in ("mask", "strength"):
            if getattr(self, name) is not None and self.image is None:
                raise ValueError(f"{name} is about an image, and there is none")
        if self.condition and self.image:
            raise ValueError("condition and image do not go together: what follows a condition begins with noise")
        if self.upscale and not self.image:
            raise ValueError("upscale is about an image, and there is none")
        for name in ("mask", "strength", "size") if self.upscale else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} does not go with upscale: all of the image is enlarged, as much as the base does")
        if self.image and int(self.steps * self.change) < 1:
            raise ValueError(f"strength {self.change:g} of {self.steps} steps is less than one step; take more steps")
        return self

    @property
    def change(self) -> float:
        """The strength that counts: diffusers' own where none is given."""
        return self.strength if self.strength is not None else 1.0 if self.mask or self.upscale else 0.8

    def facts(self) -> dict:
        """All that counted, as it is written; of a file its name alone."""
        counted = self.model_dump(mode="json", exclude_none=True, exclude={"count"})
        return counted | ({"strength": self.change} if self.image and not self.upscale else {})


def jobs(rows: list[Row], others: Mapping[str, object]) -> list[Job]:
    """A job for every picture of every row; what a row leaves out is as in `others`.

    Raises one FinetuneError with every mistake, each with its place."""
    made, problems = [], []
    for where, option, row in rows:
        try:
            made += spread(Job.model_validate({**others, **row}), where)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                key = str(problem["loc"][0]) if problem["loc"] else ""
                place = f"--{key}" if key in others and key not in row else f"{where}{option}{key}" if key else where
                problems.append(f"{place}: {explain(problem, Job)}")
    refuse(list(dict.fromkeys(problems)))       # a mistake of the command line is in every row
    return made


def spread(job: Job, where: str = "") -> list[Job]:
    """One job for each picture: of a folder every image or condition, by name, with `count` seeds in a row."""
    shown, place = ("condition", job.condition) if job.condition else ("image", job.image)
    pairs = [(place, job.mask)]
    if place and os.path.isdir(place):
        images = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES)
        if not images:
            raise FinetuneError(f"{where}: no pictures in {place}; a picture is one of {', '.join(SUFFIXES)}")
        pairs = [(image, _mask_of(image, job.mask)) for image in images]
    return [job.model_copy(update={shown: image, "mask": mask, "seed": job.seed + number, "count": 1})
            for image, mask in pairs for number in range(job.count)]


def _mask_of(image: Path, masks: Path | None) -> Path | None:
    if masks is None or not os.path.isdir(masks):
        return masks
    found = [file for file in masks.iterdir() if file.stem == image.stem and file.suffix.lower() in SUFFIXES]
    if len(found) != 1:
        raise FinetuneError(f"{masks}: {len(found)} masks for {image.name}; one with the name {image.stem}.* is needed")
    return found[0]


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises FinetuneError."""
    readers = {"": _lines, ".txt": _lines, ".jsonl": _objects, ".yaml": _list, ".yml": _list}
    if path.suffix.lower() not in readers:
        raise FinetuneError(f"{path}: prompts are read from {', '.join(filter(None, readers))}; not from {path.suffix}")
    try:
        rows = list(readers[path.suffix.lower()](path, path.read_bytes().decode("utf-8-sig")))
    except UnicodeDecodeError as e:
        raise FinetuneError(f"{path}:{e.object[:e.start].count(10) + 1}: cannot be read: not UTF-8 text") from None
    except OSError as e:
        raise FinetuneError(f"{path}: cannot be read: {e.strerror}") from None
    if not rows:
        raise FinetuneError(f"{path}: holds no prompt")
    for _, _, row in rows:
        row.update({key: path.parent / row[key] for key in ("image", "condition", "mask") if isinstance(row.get(key), str)})
    return rows


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", "  ", {"prompt": line.strip()}


def _objects(path: Path, text: str) -> Iterator[Row]:
    for where, option, row in _lines(path, text):
        try:
            value = json.loads(row["prompt"], object_pairs_hook=_once)
        except (ValueError, RecursionError) as e:
            raise FinetuneError(f"{where}: not a line of JSON: {e}") from None
        if not isinstance(value, dict):
            raise FinetuneError(f'{where}: a line is an object, as in {{"prompt": "a dog"}}')
        yield where, option, value


def _once(pairs: list[tuple[str, object]]) -> dict:
    if twice := [key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])]:
        raise ValueError(f"{twice[0]!r} is written twice")
    return dict(pairs)


def _list(path: Path, text: str) -> Iterator[Row]:
    try:
        document = parse(text)
    except NotYaml as e:
        raise FinetuneError(f"{path}:{e.line}: {e}") from None
    refuse([f"{path}:{line}  {'.'.join(key)}: {text}" for key, line, text in document.problems])
    if not isinstance(document.value or [], list):
        raise FinetuneError(f"{path}:1: a list is needed, with `- prompt: …` for each")
    for number, row in enumerate(document.value or []):
        where = f"{path}:{document.lines[(str(number),)]}"
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise FinetuneError(f"{where}: a text, or a mapping with `prompt`, is needed")
        yield where, "  ", row
