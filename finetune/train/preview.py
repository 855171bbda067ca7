"""Pictures to look at: parts at rest while they are sampled, and a labelled grid of them."""

import textwrap
from contextlib import contextmanager

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

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


def grid(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
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
