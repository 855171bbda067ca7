"""Pictures to look at: the base beside what is trained so far, parts at rest meanwhile, and a labelled grid."""

import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from finetune.disk import replacing
from finetune.recipe import Recipe
from finetune.train.sampling import followed, generate, previews

MARGIN, LABEL = 6, 15       # pixels


@contextmanager
def resting(parts: dict[str, torch.nn.Module]):
    """Inside, every part is in eval mode; afterwards in the mode it was in."""
    modes = {module: module.training for part in parts.values() for module in part.modules()}
    try:
        for part in parts.values():
            part.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def columns(recipe: Recipe, family, method, base: list[Image.Image] | None, done: int) -> dict[float, list[Image.Image]]:
    """Strength → a picture for each job after `done` steps. 0 is the base, whose pictures are sampled unless they are known."""
    found = {0.0: base} if base else {}
    with resting(family.parts):
        pipeline = family.pipeline()
        for strength in [0.0, *recipe.preview.strengths][len(found):]:
            with method.at(strength):
                found[strength] = list(generate(pipeline, previews(recipe), say=f"preview {label(strength, done)}"))
    return found


def label(strength: float, done: int) -> str:
    return "base" if not strength else f"step {done}" + (f" at {strength:g}" if strength != 1 else "")


def save(path: Path, recipe: Recipe, found: dict[float, Sequence[Image.Image]], done: int) -> Image.Image:
    """The columns as a sheet, in a file that is there as a whole or not at all."""
    jobs = previews(recipe)
    shown = {"condition": map(followed, jobs)} if recipe.preview.conditions else {}
    shown |= {label(strength, done): pictures for strength, pictures in found.items()}
    sheet = grid(list(zip(*shown.values())), [f"{job.prompt} · {job.seed}" for job in jobs], list(shown))
    with replacing(path) as staged:
        sheet.save(staged, "PNG")
    return sheet


def grid(rows: Sequence[Sequence[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """The pictures as a table; small ones are enlarged to at least 128 pixels so that they can be judged."""
    factor = max(1, -(-128 // rows[0][0].width))
    width, height = rows[0][0].width * factor, rows[0][0].height * factor
    font = ImageFont.load_default(12)
    lines = max(14, round((len(column_labels) * (width + MARGIN)) / 6.2))     # characters that fit over a row
    labels = [textwrap.wrap(label, lines) for label in row_labels]
    head = LABEL * max(map(len, labels))
    sheet = Image.new("RGB", (MARGIN + len(column_labels) * (width + MARGIN),
                              LABEL + 4 + len(rows) * (height + head + MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, label in enumerate(column_labels):
        pen.text((MARGIN + c * (width + MARGIN) + width // 2, 3), label, "black", font, anchor="ma")
    for r, (pictures, label) in enumerate(zip(rows, labels)):
        top = LABEL + 4 + r * (height + head + MARGIN)
        pen.multiline_text((MARGIN, top), "\n".join(label), "dimgray", font, spacing=1)
        for c, picture in enumerate(pictures):
            how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.pad(picture, (width, height), how, "white"), (MARGIN + c * (width + MARGIN), top + head))
    return sheet
