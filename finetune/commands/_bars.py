"""Numbers by name as bars, in the terminal and as a picture."""

from collections.abc import Mapping
from pathlib import Path

from finetune.disk import writing


def text(values: Mapping[str, float], width: int) -> list[str]:
    """A line for each name, all within the width: `  name  ████ 0.1234`."""
    name = min(max(map(len, values)), width // 2)
    room, most = width - name - 15, max(values.values()) or 1.0
    return [f"  {key[-name:]:<{name}}  {value:9.4f} {'█' * round(room * value / most)}".rstrip()
            for key, value in values.items()]


def draw(path: Path, title: str, values: Mapping[str, float], parts: Mapping[str, list[float]]) -> None:
    """A PNG with a bar for each name and on it a dot for each of its parts. FinetuneError when it cannot be written."""
    from PIL import Image, ImageDraw, ImageFont

    row, top, right, font = 24, 48, 90, ImageFont.load_default(14)
    left = 24 + round(max(map(font.getlength, values)))
    room, most = 700, max(values.values()) or 1.0
    width = max(left + room + right, 24 + round(font.getlength(title)))
    image = Image.new("RGB", (width, top + row * len(values) + 40), "white")
    pen = ImageDraw.Draw(image)
    pen.text((12, 12), title, "black", font)
    for i, (name, value) in enumerate(values.items()):
        y, end = top + row * i, left + room * value / most
        pen.text((12, y + 3), name, "black", font)
        pen.rectangle((left, y + 4, max(left + 1, end), y + row - 5), "#9ec5e8")
        pen.text((end + 6, y + 3), f"{value:.4g}", "black", font)
        for part in parts[name]:
            x, middle = left + room * part / most, y + row / 2 - 0.5
            pen.ellipse((x - 2.5, middle - 2.5, x + 2.5, middle + 2.5), "#1f4e79")
    pen.text((left, top + row * len(values) + 10), "bar: all layers of the block together; dots: each layer", "#555555", font)
    with writing(f"--plot {path}:"):
        image.save(path, "PNG")
