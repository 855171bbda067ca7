"""The small world that the tiny base knows: captioned scenes of coloured shapes, with known truth.

A scene is a value (shapes, colours, sizes, places, a background); drawing and wording are functions of it and of a
seeded generator, so every picture can be made again from its seed. Pictures are drawn four times too large and
averaged down, which is the anti-aliasing.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 64
OVERSAMPLE = 4

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS = {
    "red": (222, 40, 44), "orange": (246, 138, 28), "yellow": (252, 218, 48), "green": (46, 158, 66),
    "cyan": (52, 200, 214), "blue": (40, 82, 216), "purple": (136, 56, 176), "pink": (246, 126, 180),
}
BACKGROUNDS = {
    "white": (246, 246, 246), "black": (22, 22, 22), "gray": (128, 128, 128), "brown": (112, 74, 46),
    "navy": (22, 34, 92), "cream": (244, 230, 194), "mint": (188, 236, 208), "lavender": (206, 194, 242),
}
SIZES = {"small": 9.0, "medium": 13.0, "large": 18.0}                     # half of the drawn width, in pixels
PLACES = {"left": (-11, 0), "right": (11, 0), "top": (0, -11), "bottom": (0, 11), "center": (0, 0)}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    x: float                # centre, pixels of the 64 × 64 picture
    y: float
    angle: float            # degrees
    radius: float           # pixels


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    relation: str           # one thing: its place · two things: "left of" / "above" (first, second)
    shade: tuple[int, int, int]     # small shift of the background colour, so that no colour is one number


def random_scene(rng: random.Random, two: float = 0.2, **fixed) -> Scene:
    """Draw one scene; `two` is the share with two things; `shape`, `colour`, `background` can be fixed."""
    background = fixed.get("background") or rng.choice(list(BACKGROUNDS))
    shade = tuple(rng.randint(-7, 7) for _ in range(3))

    def thing(size: str, dx: float, dy: float, **fixed) -> Thing:
        return Thing(fixed.get("shape") or rng.choice(SHAPES), fixed.get("colour") or rng.choice(list(COLOURS)), size,
                     32 + dx + rng.uniform(-2, 2), 32 + dy + rng.uniform(-2, 2), rng.uniform(-9, 9),
                     SIZES[size] * rng.uniform(0.93, 1.07))

    if rng.random() < two:
        relation = rng.choice(["left of", "above"])
        dx, dy = (15, 0) if relation == "left of" else (0, 15)
        sizes = [rng.choice(["small", "medium"]) for _ in range(2)]
        return Scene((thing(sizes[0], -dx, -dy, **fixed), thing(sizes[1], dx, dy)), background, relation, shade)
    place = rng.choice(list(PLACES))
    return Scene((thing(rng.choice(list(SIZES)), *PLACES[place], **fixed),), background, place, shade)


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many true descriptions: size and place are sometimes left unsaid."""
    ground = rng.choice(["on a {} background", "on {}", "against a {} background", "with a {} background"])
    ground = ground.format(scene.background)

    def name(thing: Thing) -> str:
        words = [thing.colour, thing.shape]
        if rng.random() < 0.5:
            words.insert(0, thing.size)
        return " ".join(["an" if words[0] == "orange" else "a", *words])

    first = name(scene.things[0])
    if len(scene.things) == 2:
        second = name(scene.things[1])
        middle = rng.choice(["{a} and {b}", "{a} to the left of {b}"] if scene.relation == "left of"
                            else ["{a} and {b}", "{a} above {b}"])
        body = middle.format(a=first, b=second)
    elif rng.random() < 0.5:
        place = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom",
                 "center": "in the center"}[scene.relation]
        body = f"{first} {place}"
    else:
        body = first
    lead = rng.choice(["", "", "", "a picture of ", "a drawing of ", "an image of "])
    return rng.choice(["{lead}{body} {ground}", "{lead}{body}, {plain} background"]).format(
        lead=lead, body=body, ground=ground, plain=scene.background)


def outline(shape: str) -> list[tuple[float, float]]:
    """The shape as a polygon in [-1, 1]²; y points down."""
    turn = [2 * math.pi * i / 72 for i in range(72)]
    if shape in ("circle", "ring"):
        return [(math.cos(a), math.sin(a)) for a in turn]
    if shape == "square":
        return [(-.86, -.86), (.86, -.86), (.86, .86), (-.86, .86)]
    if shape == "diamond":
        return [(0, -1.1), (.8, 0), (0, 1.1), (-.8, 0)]
    if shape == "triangle":
        return [(0, -1.05), (1.0, .8), (-1.0, .8)]
    if shape == "star":
        return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
                for i in range(10) for r in [1.15 if i % 2 == 0 else .48]]
    if shape == "heart":
        return [(.066 * 16 * math.sin(a) ** 3, -.066 * (13 * math.cos(a) - 5 * math.cos(2 * a)
                - 2 * math.cos(3 * a) - math.cos(4 * a))) for a in turn]
    if shape == "cross":
        w = .36
        return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    raise ValueError(shape)


def polygon(thing: Thing, scale: float = 1.0) -> list[tuple[float, float]]:
    """The thing's outline in pixels of the oversampled picture."""
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    r = thing.radius * scale
    return [((thing.x + r * (px * cos - py * sin)) * OVERSAMPLE, (thing.y + r * (px * sin + py * cos)) * OVERSAMPLE)
            for px, py in outline(thing.shape)]


def mask(thing: Thing) -> Image.Image:
    """Where the thing is, as an oversampled 8-bit mask; a ring has a hole."""
    image = Image.new("L", (SIZE * OVERSAMPLE,) * 2)
    pen = ImageDraw.Draw(image)
    pen.polygon(polygon(thing), fill=255)
    if thing.shape == "ring":
        pen.polygon(polygon(thing, 0.52), fill=0)
    return image


def ground_colour(scene: Scene) -> tuple[int, ...]:
    return tuple(max(0, min(255, c + s)) for c, s in zip(BACKGROUNDS[scene.background], scene.shade))


def draw(scene: Scene) -> Image.Image:
    """The scene in flat colours, 64 × 64 RGB."""
    image = Image.new("RGB", (SIZE * OVERSAMPLE,) * 2, ground_colour(scene))
    for thing in scene.things:
        image.paste(COLOURS[thing.colour], mask=mask(thing))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def doodle(rng: random.Random) -> Image.Image:
    """A meaningless picture (gradient, lines, polygons): the VAE also learns from these, so that it can carry styles
    and subjects that the world of scenes does not have."""
    side = SIZE * OVERSAMPLE

    def colour() -> tuple[int, ...]:
        return tuple(rng.randint(0, 255) for _ in range(3))

    def point() -> tuple[float, float]:
        return rng.uniform(-20, side + 20), rng.uniform(-20, side + 20)

    image = Image.new("RGB", (2, 2))
    image.putdata([colour() for _ in range(4)])
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 12)):
        kind = rng.random()
        if kind < 0.4:
            pen.line([point(), point()], fill=colour(), width=rng.randint(3, 16))
        elif kind < 0.7:
            pen.polygon([point() for _ in range(rng.randint(3, 5))], fill=colour())
        else:
            (x, y), r = point(), rng.uniform(6, 70)
            pen.ellipse([x - r, y - r, x + r, y + r], fill=colour(), outline=colour(), width=rng.randint(1, 8))
    if rng.random() < 0.3:
        spacing, angle, ink = rng.uniform(12, 30), rng.uniform(0, math.pi), colour()
        dx, dy = math.cos(angle), math.sin(angle)
        for i in range(-40, 40):
            cx, cy = side / 2 - dy * i * spacing, side / 2 + dx * i * spacing
            pen.line([(cx - dx * 400, cy - dy * 400), (cx + dx * 400, cy + dy * 400)], fill=ink, width=rng.randint(4, 7))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)
