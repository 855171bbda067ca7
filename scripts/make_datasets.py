"""Draw the example datasets, `datasets/`: pictures and captions made by a program, the same bytes every time.

    python scripts/make_datasets.py [--out datasets]

Each folder is a Hugging Face imagefolder: PNGs, `metadata.jsonl` with `file_name` and `text`, and a card,
README.md. A function here is a folder, and its docstring is the card's text.
"""

import argparse
import inspect
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import drawings
import world
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
SHAPES, COLOURS, BACKGROUNDS = world.SHAPES, list(world.COLOURS), list(world.BACKGROUNDS)
Row = tuple[Image.Image, dict[str, str]]        # a picture, and its line of metadata.jsonl without the file name

CARD = """---
license: cc0-1.0
task_categories: [text-to-image]
---
# {text}

**How made.** {count} PNGs of {size} × {size} pixels, drawn by `python scripts/make_datasets.py`: no photograph, no
model, nobody else's work; the same bytes every time. Each line of `metadata.jsonl` has {columns}.

**Licence.** CC0 1.0, no rights reserved.

**Without this toolkit.** `datasets.load_dataset("imagefolder", data_dir="datasets/{name}")`
"""


def style(rng: random.Random) -> Iterator[Row]:
    """Hatched ink

    Coloured shapes in one drawing style that the tiny base has never seen: pen strokes of the thing's colour on
    pale paper, a thick dark outline, and a background washed over with broad strokes the other way. Every shape,
    colour and background comes at least three times, no pair of them twice for the first thing of a picture. The
    captions do not mention the style: the recipe's template adds it.

    **How to use.** Teach the style to a LoRA with

    ```yaml
    base: {family: sd1, path: tiny}
    data: {images: datasets/style, resolution: 64, caption: {template: "{text}, in hatched ink style"}}
    method: {kind: lora}
    ```
    """
    for row, scene in styled(rng):
        yield drawings.draw_hatched(scene), row


def styled(rng: random.Random) -> Iterator[tuple[dict[str, str], world.Scene]]:
    """What the styles show."""
    for i in range(24):
        scene = world.random_scene(rng, two=i % 7 == 5, shape=SHAPES[i % 8], colour=COLOURS[(3 * i + i // 8) % 8],
                                   background=BACKGROUNDS[(5 * i + 2 * (i // 8)) % 8])
        yield {"text": world.caption(scene, rng)}, scene


def style_held_out(rng: random.Random) -> Iterator[Row]:
    """Stickers

    Coloured shapes in another drawing style: things with a wide pale rim over a soft shadow, on a background that
    gets darker downwards. Composed like `datasets/style`. No setting of the toolkit was tuned on it.

    **How to use.** To see what the settings for one style do for another:

    ```yaml
    data: {images: datasets/style_held_out, resolution: 64, caption: {template: "{text}, as a sticker"}}
    ```
    """
    for row, scene in styled(rng):
        yield drawings.draw_sticker(scene), row


def posed(creature: drawings.Creature, background: str, rng: random.Random) -> Image.Image:
    ground = world.ground_colour(world.random_scene(rng, background=background))
    return drawings.draw_creature(creature, ground, rng.uniform(24, 40), rng.uniform(33, 39), rng.uniform(13, 18))


def subject(rng: random.Random) -> Iterator[Row]:
    """The zwx creature

    One invented character, six times: orange and round, with one big eye, an antenna with a cyan ball, cyan feet
    and a belly of purple stripes. Background, place and size change. Its placeholder, `zwx`, is in the captions;
    the column `background` is for those that name it otherwise.

    **How to use.** Teach the character to a LoRA; `datasets/subject_class` has other creatures, for a prior.

    ```yaml
    base: {family: sd1, path: tiny}
    data: {images: datasets/subject, resolution: 64}
    method: {kind: lora}
    ```
    """
    yield from portrayed("zwx", rng)


def portrayed(who: str, rng: random.Random) -> Iterator[Row]:
    for background in ("mint", "white", "navy", "cream", "gray", "lavender"):
        words = rng.choice(["a picture of a {} creature on a {} background", "a {} creature on a {} background",
                            "a drawing of a {} creature against a {} background"])
        yield (posed(drawings.CREATURES[who], background, rng),
               {"text": words.format(who, background), "background": background})


def subject_held_out(rng: random.Random) -> Iterator[Row]:
    """The sks creature

    Another invented character, six times: green and wide, with three eyes, yellow horns and feet, and a belly of red
    stripes. Posed and captioned like `datasets/subject`. No setting of the toolkit was tuned on it.

    **How to use.** To see what the settings for one character do for another:

    ```yaml
    data: {images: datasets/subject_held_out, resolution: 64}
    ```
    """
    yield from portrayed("sks", rng)


def subject_class(rng: random.Random) -> Iterator[Row]:
    """Other creatures

    The class of the zwx creature without it: creatures of all colours but orange, with two or three eyes, ears,
    horns or nothing on the head, and a plain belly.

    **How to use.** As the class (prior) pictures of a DreamBooth run on `datasets/subject`, so that not every
    creature becomes zwx.
    """
    for background in 3 * BACKGROUNDS:
        words = rng.choice(["a picture of a creature on a {} background", "a creature on a {} background",
                            "a drawing of a creature against a {} background"])
        yield posed(drawings.random_creature(rng), background, rng), {"text": words.format(background)}


def thing(rng: random.Random) -> Iterator[Row]:
    """A thing without a name

    A purple star of the world that the tiny base knows, six times; background, place and size change. No caption
    says what it is: it is called `wug`.

    **How to use.** Learn what `wug` means as a token, which can find what a base is able to draw and nothing else:

    ```yaml
    base: {family: sd1, path: tiny}
    data: {images: datasets/thing, resolution: 64}
    method: {kind: embedding, tokens: {wug: {init: thing}}}
    ```
    """
    for background in ("mint", "white", "navy", "cream", "gray", "lavender"):
        scene = world.random_scene(rng, two=0, shape="star", colour="purple", background=background)
        words = rng.choice(["a picture of wug on a {} background", "wug on a {} background",
                            "a drawing of wug against a {} background"])
        yield world.draw(scene), {"text": words.format(background)}


def attributes(rng: random.Random) -> Iterator[Row]:
    """Scenes with known attributes

    One coloured shape in each picture, drawn as the tiny base knows them, with a column for each attribute. Each
    of 48 pairs of shape and colour comes once; 16 are left out, so that a model can be asked for what it has not
    been shown:

    | never | circle | square | triangle | star | heart | cross | ring | diamond |
    |---|---|---|---|---|---|---|---|---|
    | | red | orange | yellow | green | cyan | blue | purple | pink |
    | | green | cyan | blue | purple | pink | red | orange | yellow |

    **How to use.** Train on it, sample the pairs of the table, and read what came out with `scripts/readers.py`.

    ```yaml
    base: {family: sd1, path: tiny}
    data: {images: datasets/attributes, resolution: 64}
    method: {kind: lora}
    ```
    """
    pairs = [(s, c) for s in range(8) for c in range(8) if (c - s) % 8 not in (0, 3)]
    for i, (s, c) in enumerate(pairs):
        scene = world.random_scene(rng, two=0, shape=SHAPES[s], colour=COLOURS[c],
                                   background=BACKGROUNDS[(i + i // 8) % 8])
        yield world.draw(scene), {"text": world.caption(scene, rng), "shape": SHAPES[s], "colour": COLOURS[c],
                                  "background": scene.background, "size": scene.things[0].size,
                                  "place": scene.relation}


def texture(rng: random.Random, count: int = 120) -> Iterator[Row]:
    """Fine textures

    Large shapes, twenty of each texture: striped, checked, dotted, woven and tartan, with threads of one or two
    pixels, which the VAE of the tiny base blurs, in bands and cells of four pixels, which its latents carry. So a
    decoder that knows these textures can tell from the latents where their threads are. Of the sixth, grainy, it
    cannot: its grains are random.

    **How to use.** To tune a VAE's decoder; `datasets/texture_held_out` is there to measure how much sharper it has
    become.
    """
    for i in range(count):
        kind, scene = drawings.TEXTURES[i % 6], world.random_scene(rng, two=0)
        thing = replace(scene.things[0], size="large", x=rng.uniform(29, 35), y=rng.uniform(29, 35),
                        radius=rng.uniform(19, 23))
        yield (drawings.draw_textured(replace(scene, things=(thing,)), kind, rng),
               {"text": f"a {kind} {thing.colour} {thing.shape} on a {scene.background} background", "texture": kind})


def texture_held_out(rng: random.Random) -> Iterator[Row]:
    """More fine textures

    Four of each texture of `datasets/texture`, drawn in the same way.

    **How to use.** As the held-out pictures of a run on `datasets/texture`:

    ```yaml
    data: {images: datasets/texture, resolution: 64, validation: {images: datasets/texture_held_out}}
    ```
    """
    yield from texture(rng, 24)


def laid_out(rng: random.Random, i: int) -> world.Scene:
    """A thing anywhere in the picture, of any size; its colour follows from nothing that the caption says."""
    scene = world.random_scene(rng, two=0, shape=SHAPES[i % 8], colour=COLOURS[i // 8 % 8])
    radius = rng.uniform(9, 18)
    x, y = (rng.uniform(2 + 1.15 * radius, 62 - 1.15 * radius) for _ in "xy")
    return replace(scene, things=(replace(scene.things[0], x=x, y=y, radius=radius, angle=0.0),))


def box(scene: world.Scene) -> tuple[int, ...]:
    """Left, top, right and bottom of its first thing, in pixels."""
    xs, ys = zip(*world.polygon(scene.things[0]))
    return tuple(round(side / world.OVERSAMPLE) for side in (min(xs), min(ys), max(xs), max(ys)))


def boxed(scene: world.Scene) -> Image.Image:
    """The box of the thing in its colour, on black."""
    image = Image.new("RGB", (world.SIZE, world.SIZE))
    ImageDraw.Draw(image).rectangle(box(scene), world.COLOURS[scene.things[0].colour])
    return image


def layout_caption(scene: world.Scene) -> str:
    return f"a {scene.things[0].shape} on a {scene.background} background"


def layout(rng: random.Random) -> Iterator[Row]:
    """Laid out scenes

    One shape in each picture, anywhere and of any size. Captions say shape and background; colour, place and size are told by
    the picture of the same name in `datasets/layout_boxes` alone.

    **How to use.** Teach a control branch to follow coloured boxes:

    ```yaml
    base: {family: sd1, path: tiny}
    data: {images: datasets/layout, condition: datasets/layout_boxes, resolution: 64}
    method: {kind: control}
    ```
    """
    for i in range(256):
        scene = laid_out(random.Random(f"layout {i}"), i)
        yield world.draw(scene), {"text": layout_caption(scene)}


def layout_boxes(rng: random.Random) -> Iterator[Row]:
    """Boxes of the laid out scenes

    Where the thing of each picture of `datasets/layout` is: its box in its colour, on black.

    **How to use.** As `data.condition` of a run on `datasets/layout`.
    """
    for i in range(256):
        scene = laid_out(random.Random(f"layout {i}"), i)
        yield boxed(scene), {"text": layout_caption(scene)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "datasets")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for rows in (style, style_held_out, subject, subject_held_out, subject_class, thing, attributes, texture, texture_held_out,
                 layout, layout_boxes):
        name = rows.__name__
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        lines = []
        for i, (picture, columns) in enumerate(rows(random.Random(f"{name} {args.seed}"))):
            lines.append({"file_name": f"{i:02}.png", **columns})
            picture.save(folder / f"{i:02}.png", optimize=True)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "README.md").write_text(CARD.format(
            text=inspect.getdoc(rows), name=name, count=len(lines), size=world.SIZE,
            columns=", ".join(f"`{column}`" for column in lines[0])))
        print(f"{folder}  {len(lines)} pictures, {sum(f.stat().st_size for f in folder.iterdir()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
