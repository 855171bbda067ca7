"""What the score scripts share: captions of known truth, plain diffusers sampling, counting what is right."""

import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import readers
import torch
import world
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from tqdm import tqdm

ATTRIBUTES = ("shape", "colour", "background")


@dataclass(frozen=True)
class Order:
    """A picture to be sampled."""
    caption: str
    truth: dict[str, str]
    seed: int


def orders(count: int) -> list[Order]:
    """The first of 512: every shape × colour × background once, each 64 of them with every shape × colour."""
    found = []
    for i in range(count):
        turn, s, c = i // 64, i // 8 % 8, i % 8
        rng = random.Random(f"order {i}")
        scene = world.random_scene(rng, two=0, shape=world.SHAPES[s], colour=list(world.COLOURS)[c],
                                   background=list(world.BACKGROUNDS)[(s + c + turn) % 8])
        found.append(Order(world.caption(scene, rng), readers.truth(scene), 1000 + i))
    return found


def pipeline(base: str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: StableDiffusionPipeline, asked: list[Order], steps: int, guidance: float,
           template: str = "{text}", batch: int = 32) -> list[Image.Image]:
    """One picture for each order; its noise depends on its own seed only."""
    pictures = []
    for i in tqdm(range(0, len(asked), batch), desc="sample", unit="batch"):
        part = asked[i:i + batch]
        pictures += pipe([template.format(text=order.caption) for order in part], num_inference_steps=steps,
                         guidance_scale=guidance,
                         generator=[torch.Generator().manual_seed(order.seed) for order in part]).images
    return pictures


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, right / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def count_right(asked: list[Order], found: list[dict[str, str]]) -> dict[str, dict]:
    """Share of what was read right and its 95 % interval: each attribute, and `all` three at once."""
    hits = {head: [order.truth[head] == words[head] for order, words in zip(asked, found)] for head in ATTRIBUTES}
    hits["all"] = [all(row) for row in zip(*hits.values())]
    return {name: {"share": round(sum(row) / len(row), 4),
                   "interval": [round(end, 4) for end in interval(sum(row), len(row))]}
            for name, row in hits.items()}


def confusions(asked: list[Order], found: list[dict[str, str]]) -> list[str]:
    """What was most often taken for something else, worst first."""
    wrong = Counter(f"{head}: {order.truth[head]} read as {words[head]}" for order, words in zip(asked, found)
                    for head in ATTRIBUTES if order.truth[head] != words[head])
    return [f"{words} ×{times}" for words, times in wrong.most_common(12)]


def percents(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.2%}" for name, share in shares.items())


def sheet(path: Path, pictures: list[Image.Image], labels: list[str], columns: int = 8, zoom: int = 2) -> None:
    """Write the pictures as a grid, each over its label."""
    side, line = world.SIZE * zoom, 14
    grid = Image.new("RGB", (columns * (side + 4), -(-len(pictures) // columns) * (side + line)), "white")
    pen = ImageDraw.Draw(grid)
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        x, y = i % columns * (side + 4), i // columns * (side + line)
        grid.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.text((x + 1, y + side), label, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
