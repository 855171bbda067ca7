"""Drawings that the tiny base has never seen: a style, a kind of creature, fine textures.

They are what the example datasets are made of (`make_datasets.py`); the readers learn the style from fresh ones.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import world
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, ...]
SIDE = world.SIZE * world.OVERSAMPLE
PAPER, INK = (250, 243, 226), (22, 18, 28)


def blend(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with this share of `b` mixed in."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b))


def shrink(image: Image.Image) -> Image.Image:
    return image.resize((world.SIZE, world.SIZE), Image.Resampling.BOX)


# Style: hatched ink. Strokes are broad, for the tiny VAE keeps nothing finer, and repeat on its grid of 4 × 4
# pixels, so that a small adapter can learn them from a few pictures.

def strokes(slope: int, period: float, width: float) -> Image.Image:
    """Parallel diagonal pen strokes of a slightly unsteady hand, as an oversampled mask: 1 falls, -1 rises; the
    period is measured along a row of pixels, the width across the stroke."""
    y, x = np.mgrid[:SIDE, :SIDE] / world.OVERSAMPLE
    across = x - slope * y + 0.7 * np.sin((x + slope * y) * math.tau / 32)
    return Image.fromarray(np.where(across % period < width * math.sqrt(2), 255, 0).astype(np.uint8))


HATCH, WASH = strokes(-1, 12, 4.6), strokes(1, 16, 5.0)


def draw_hatched(scene: world.Scene) -> Image.Image:
    """The scene in hatched ink: things are pen strokes of their colour on pale paper inside a thick dark outline,
    and the background is washed over with broad strokes the other way."""
    ground = blend(world.ground_colour(scene), PAPER, 0.15)
    image = Image.new("RGB", (SIDE, SIDE), ground)
    image.paste(blend(ground, INK if sum(ground) > 330 else PAPER, 0.22), mask=WASH)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        colour = world.COLOURS[thing.colour]
        thing = replace(thing, radius=1.05 * thing.radius + 2)         # room for the outline
        inside = Image.new("RGB", (SIDE, SIDE), blend(colour, PAPER, 0.45))
        inside.paste(colour, mask=HATCH)
        image.paste(inside, mask=world.mask(thing))
        for scale in (1.0, 0.52) if thing.shape == "ring" else (1.0,):
            edge = world.polygon(thing, scale)
            pen.line([*edge, *edge[:2]], fill=INK, width=round(2.8 * world.OVERSAMPLE), joint="curve")
    return shrink(image)


# A second style, which no setting was tuned on: stickers.

def draw_sticker(scene: world.Scene) -> Image.Image:
    """The scene as stickers: things in their colour with a wide pale rim, over a soft dark shadow to the lower right, and a
    background that gets darker downwards."""
    ground = world.ground_colour(scene)
    shade = Image.linear_gradient("L").resize((SIDE, SIDE)).point(lambda v: round(0.4 * v))
    image = Image.composite(Image.new("RGB", (SIDE, SIDE), INK), Image.new("RGB", (SIDE, SIDE), ground), shade)
    for thing in scene.things:
        rim = replace(thing, radius=1.2 * thing.radius + 1.5)
        shadow = replace(rim, x=thing.x + 3.5, y=thing.y + 3.5)
        image.paste(INK, mask=world.mask(shadow).filter(ImageFilter.GaussianBlur(5)).point(lambda v: round(0.7 * v)))
        image.paste(PAPER, mask=world.mask(rim))
        image.paste(world.COLOURS[thing.colour], mask=world.mask(thing))
    return shrink(image)


STYLES = {"plain": world.draw, "hatched": draw_hatched, "sticker": draw_sticker}


# Subject: creatures. Two of them are somebody; no setting was tuned on the second.

BODIES = {"round": (1.0, 1.0), "tall": (0.82, 1.18), "wide": (1.2, 0.85)}       # radii of the body's ellipse


@dataclass(frozen=True)
class Creature:
    colour: Colour
    body: str                           # one of BODIES
    eyes: int
    top: str                            # "antenna" · "ears" · "horns" · "bald"
    belly: tuple[Colour, ...]           # one colour is plain, two are stripes
    accent: Colour                      # antenna ball, ears, horns, feet


CREATURES = {
    "zwx": Creature(world.COLOURS["orange"], "round", 1, "antenna", ((255, 244, 214), (122, 44, 160)), (36, 196, 214)),
    "sks": Creature(world.COLOURS["green"], "wide", 3, "horns", ((255, 244, 214), (196, 30, 52)), world.COLOURS["yellow"]),
}


def random_creature(rng: random.Random) -> Creature:
    """Nobody of CREATURES: never striped; nor orange, one-eyed or with an antenna."""
    names = rng.sample([c for c in world.COLOURS if c != "orange"], 2)
    colour, accent = (world.COLOURS[n] for n in names)
    return Creature(colour, rng.choice(list(BODIES)), rng.choice([2, 2, 3]), rng.choice(["ears", "horns", "bald"]),
                    (blend(colour, (255, 255, 255), 0.55),), accent)


def draw_creature(creature: Creature, ground: Colour, x: float, y: float, radius: float) -> Image.Image:
    """The creature with its body's centre at (x, y), in pixels of the 64 × 64 picture."""
    image = Image.new("RGB", (SIDE, SIDE), ground)
    pen = ImageDraw.Draw(image)
    wide, high = BODIES[creature.body]

    def at(u: float, v: float) -> tuple[float, float]:
        """A point in body radii, as an oversampled pixel."""
        return (x + radius * u) * world.OVERSAMPLE, (y + radius * v) * world.OVERSAMPLE

    def oval(u: float, v: float, ru: float, rv: float, fill: Colour) -> None:
        pen.ellipse([*at(u - ru, v - rv), *at(u + ru, v + rv)], fill=fill)

    for side in (-1, 1):
        oval(side * 0.45 * wide, high, 0.34, 0.2, creature.accent)
        if creature.top == "ears":
            oval(side * 0.6 * wide, -0.85 * high, 0.32, 0.42, creature.accent)
        if creature.top == "horns":
            pen.polygon([at(side * 0.75 * wide, -1.35 * high), at(side * 0.25 * wide, -0.8 * high),
                         at(side * 0.85 * wide, -0.4 * high)], fill=creature.accent)
    if creature.top == "antenna":
        pen.line([at(0, -0.9 * high), at(0.12, -1.5 * high)], fill=INK, width=round(0.64 * radius))
        oval(0.12, -1.5 * high, 0.25, 0.25, creature.accent)
    oval(0, 0, wide, high, creature.colour)
    belly = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(belly).ellipse([*at(-0.62 * wide, 0.12 * high), *at(0.62 * wide, 0.92 * high)], fill=255)
    inside = Image.new("RGB", (SIDE, SIDE), creature.belly[0])
    bars = ImageDraw.Draw(inside)
    for v in (0.24, 0.56, 0.88) if len(creature.belly) == 2 else ():
        bars.rectangle([*at(-1, (v - 0.08) * high), *at(1, (v + 0.08) * high)], fill=creature.belly[1])
    image.paste(inside, mask=belly)
    size = {1: 0.4, 2: 0.27, 3: 0.22}[creature.eyes]
    for i in range(creature.eyes):
        u = (i - (creature.eyes - 1) / 2) * 2.1 * size
        oval(u, -0.36 * high, size, size, (255, 255, 255))
        oval(u + 0.06, -0.34 * high, 0.55 * size, 0.55 * size, INK)
    return shrink(image)


# Texture: bands and cells on the tiny VAE's own grid of 4 × 4 pixels, which its latents carry, with threads of one or two
# pixels in them that it blurs. Where the threads are follows from the bands. Where the grains are follows from nothing.

TEXTURES = ("striped", "checked", "dotted", "woven", "tartan", "grainy")


def texture(kind: str, rng: random.Random) -> np.ndarray:
    """How dark each pixel is, (64, 64) in [0, 1]."""
    y, x = np.mgrid[:world.SIZE, :world.SIZE]
    row, column = y // 4 % 2, x // 4 % 2
    middle_y, middle_x = (y % 4 == 1) | (y % 4 == 2), (x % 4 == 1) | (x % 4 == 2)
    if kind == "striped":               # a pale thread along each dark band
        return row * (1 - 0.8 * middle_y)
    if kind == "checked":               # a pale point in each dark cell
        return (row ^ column) * (1.0 - (middle_y & middle_x))
    if kind == "dotted":                # a dot in each fourth cell, which is shaded
        return row * column * (0.4 + 0.6 * (middle_y & middle_x))
    if kind == "woven":                 # thin threads go over and, paler, under
        return np.where(row ^ column, 0.5 + 0.5 * (x % 2), 0.5 * (y % 2))
    if kind == "tartan":                # bands of threads both ways
        return (row * (1 - 0.8 * middle_y) + column * (1 - 0.8 * middle_x)) / 2
    if kind == "grainy":
        return np.random.default_rng(rng.randrange(2 ** 32)).random((world.SIZE, world.SIZE))
    raise ValueError(kind)


def draw_textured(scene: world.Scene, kind: str, rng: random.Random) -> Image.Image:
    """The scene with its things of this texture, in the thing's colour and a darker one."""
    image = Image.new("RGB", (world.SIZE, world.SIZE), world.ground_colour(scene))
    for thing in scene.things:
        colour = np.array(world.COLOURS[thing.colour], float)
        cloth = colour * (1 - 0.62 * texture(kind, rng)[..., None])
        image.paste(Image.fromarray(cloth.round().astype(np.uint8)), mask=shrink(world.mask(thing)))
    return image
