"""What an adapter does to pictures, in numbers: each function samples with a run's adapter and has readers say what is shown.

Of scripts/results.py. Readers are scripts/readers.py and scripts/creatures.py.
"""

import json
import random
from contextlib import ExitStack
from pathlib import Path

import creatures
import drawings
import make_datasets
import numpy as np
import readers
import sampling
import torch
import world
from PIL import Image

from finetune import registry, tokens
from finetune.families import base as families
from finetune.formats import _tokens
from finetune.formats import base as formats
from finetune.objectives import _similarity as similarity
from finetune.train import adapters
from finetune.train.jobs import Job
from finetune.train.sampling import generate, settle

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "results"
STEPS, GUIDANCE, COUNT, SHOWN = 25, 2.0, 64, 8
LOOKS = {"hatched": "{text}, in hatched ink style", "sticker": "{text}, as a sticker"}
Shares = dict[str, float]           # what → share; of what ends in dB or SSIM the number itself



def load(path: Path | str):
    return registry.find("families", "sd1").load(str(path))


def pictures(run: Path, part: str, captions: list[str], files: list[Path] = (),
             base: Path | str = "tiny") -> list[Image.Image]:
    """Sampled by our own sampler with the adapters merged and the tokens added, each from a seed of its own."""
    family = load(base)
    found = [(file, formats.load(file, family.spec)) for file in files]
    learned = {_tokens.token(file): _tokens.rows(a) for file, a in found if a.kind == "embedding"}
    asked = [sampling.Order(caption, {}, 1000 + i) for i, caption in enumerate(captions)]
    with ExitStack() as stack:
        stack.enter_context(families.merged(family.parts, [(a, 1.0) for _, a in found if a.kind != "embedding"]))
        stack.enter_context(tokens.added(family, learned))
        pipe = family.pipeline()
        pipe.set_progress_bar_config(disable=True)
        drawn = sampling.sample(pipe, asked, STEPS, GUIDANCE)
    sampling.sheet(run / f"{part}.png", drawn[:32], [caption[:22] for caption in captions[:32]])
    strip(run, part, drawn[:SHOWN])
    return drawn


def strip(run: Path, part: str, drawn: list[Image.Image]) -> None:
    """What docs/results/ shows of it."""
    found = Image.new("RGB", (SHOWN * (world.SIZE + 2), world.SIZE), "white")
    for i, picture in enumerate(drawn):
        found.paste(picture, (i * (world.SIZE + 2), 0))
    found.save(run / f"{part}.strip.png")


def files(run: Path) -> list[Path]:
    """One of each adapter: a further format holds the same again."""
    return sorted(path for path in (run / "adapter").glob("*.safetensors") if not path.stem.endswith(".diffusers"))


# Style: is it in the style, and does it still show what was asked for?

def styled(run: Path, part: str, look: str = "hatched", **who) -> Shares:
    asked = sampling.orders(COUNT)
    found = readers.read(readers.trained_reader(styles=True)[0],
                         pictures(run, part, [LOOKS[look].format(text=order.caption) for order in asked], **who))
    shares = {head: score["share"] for head, score in sampling.count_right(asked, found).items()}
    return shares | {"style": sum(words["style"] == look for words in found) / len(found)}


def plain_base(look: str = "hatched") -> Shares:
    """What the base makes of the same prompts; measured once."""
    (run := RUNS / f"base, {look}").mkdir(parents=True, exist_ok=True)
    if not (found := run / "score.json").exists():
        found.write_text(json.dumps(styled(run, "base", look)))
    return json.loads(found.read_text())


def kept(shares: Shares, before: Shares) -> Shares:
    """What is right, less what was right before; 100 % is as much."""
    return {f"{head} kept": 1 + shares[head] - before[head] for head in sampling.ATTRIBUTES}


def style(run: Path, look: str = "hatched") -> Shares:
    shares = styled(run, "style", look, files=files(run))
    return {"in style": shares["style"]} | kept(shares, plain_base(look))


def whole_style(run: Path) -> Shares:
    """Of the model itself, and of the LoRA that was extracted of it."""
    whole = styled(run, "style", base=next(path.parent for path in run.glob("adapter/*/model_index.json")))
    lora = styled(run, "extracted", files=files(run))
    return ({"in style": whole["style"]} | kept(whole, plain_base())
            | {"extracted LoRA as much in style": 1 + lora["style"] - whole["style"]})


# Subject: is it there in new scenes, and not where it was not asked for?

FORMS = ("a picture of {who} on a {ground} background", "{who} on a {ground} background",
         "a drawing of {who} against a {ground} background")
GROUNDS = [list(world.BACKGROUNDS)[i % 8] for i in range(COUNT)]


def scenes(who: str) -> list[str]:
    return [FORMS[i % 3].format(who=who, ground=ground) for i, ground in enumerate(GROUNDS)]


def recognised(run: Path, who: str = "an orange zwx creature", name: str = "zwx") -> Shares:
    """`who` is what the prompts say, `name` the creature of drawings.py."""
    found = creatures.read(creatures.trained(name)[0], pictures(run, "subject", scenes(who), files(run)))
    return {"recognised": found.count("the one") / COUNT}


def subject(run: Path, who: str = "an orange zwx creature", name: str = "zwx") -> Shares:
    found = creatures.read(creatures.trained(name)[0], pictures(run, "class", scenes("a creature"), files(run)))
    return recognised(run, who, name) | {"class stays plain": 1 - found.count("the one") / COUNT}


def thing(run: Path) -> Shares:
    """The thing of datasets/thing in new scenes: its shape, its colour, and the background that was asked for."""
    found = readers.read(readers.trained_reader(styles=False)[0], pictures(run, "thing", scenes("wug"), files(run)))
    truths = [{"shape": "star", "colour": "purple", "background": ground} for ground in GROUNDS]
    right = [all(words[head] == truth[head] for head in truth) for words, truth in zip(found, truths)]
    return {"recognised": sum(right) / COUNT}


def combined(run: Path) -> Shares:
    """Shapes and colours that datasets/attributes never shows together, by the words that were learned for each."""
    pairs = [(s, (s + k) % 8) for k in (0, 3) for s in range(8)]
    grounds = list(world.BACKGROUNDS)
    scenes = [{"shape": world.SHAPES[s], "colour": list(world.COLOURS)[c], "background": grounds[(s + c + turn) % 8]}
              for turn in range(COUNT // 16) for s, c in pairs]
    captions = ["a colour-{colour} shape-{shape} on a {background} background".format(**scene) for scene in scenes]
    found = readers.read(readers.trained_reader(styles=False)[0], pictures(run, "unseen pairs", captions, files(run)))
    return {"shape and colour right": sum(all(words[head] == scene[head] for head in ("shape", "colour"))
                                          for words, scene in zip(found, scenes)) / COUNT}


# Layout: does the scene follow a box, of which its caption does not tell?

def followed(run: Path) -> Shares:
    """The colour of the box and the shape of the caption by a reader, and the thing where the box is: their overlap is half of
    both together or more. Beside it the true pictures through the VAE, which are the most that can be."""
    scenes = [make_datasets.laid_out(random.Random(f"held-out layout {i}"), i) for i in range(COUNT)]
    (run / "boxes").mkdir(exist_ok=True)
    for i, scene in enumerate(scenes):
        make_datasets.boxed(scene).save(run / "boxes" / f"{i:02}.png")
    strip(run, "boxes", [make_datasets.boxed(scene) for scene in scenes[:SHOWN]])
    family = load("tiny")
    branch = adapters.load([(next(run.glob("adapter/*/config.json")).parent, 1.0)], family)
    truth = shown(through(family.parts["vae"], 2 * readers.tensor([world.draw(scene) for scene in scenes]) - 1))
    jobs = [Job(prompt=make_datasets.layout_caption(scene), seed=1000 + i, steps=STEPS, guidance=GUIDANCE,
                condition=run / "boxes" / f"{i:02}.png") for i, scene in enumerate(scenes)]
    with adapters.on(family, branch):
        drawn = list(generate(family.pipeline(), settle(family, jobs), 32))
    sampling.sheet(run / "control.png", drawn[:32], [job.prompt[2:24] for job in jobs[:32]])
    strip(run, "control", drawn)
    return as_boxed(drawn, scenes) | {"all three right, truth": as_boxed(truth, scenes)["all three right"]}


def as_boxed(pictures: list[Image.Image], scenes: list[world.Scene]) -> Shares:
    """How many pictures show what their scenes do, each by its head and where its box is."""
    words = readers.read(readers.trained_reader(styles=False)[0], pictures)
    truths = [readers.truth(scene) for scene in scenes]
    right = {head: [word[head] == truth[head] for word, truth in zip(words, truths)] for head in ("colour", "shape")}
    right["place"] = [overlap(found(picture), make_datasets.box(scene)) >= 0.5 for picture, scene in zip(pictures, scenes)]
    right["all three"] = [all(row) for row in zip(*right.values())]
    return {f"{what} right": sum(row) / len(row) for what, row in right.items()}


def found(picture: Image.Image) -> tuple[int, ...] | None:
    """The box of all that is unlike the picture's border. Its two outer pixels do not count: the VAE draws specks there, and
    no thing is there."""
    rgb = np.array(picture).astype(int)
    border = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), axis=0)
    box = Image.fromarray(np.abs(rgb - border).max(2)[2:-2, 2:-2] > 40).getbbox()
    return box and tuple(side + 2 for side in box)


def overlap(one: tuple[int, ...] | None, other: tuple[int, ...]) -> float:
    """Intersection over union of two boxes."""
    if one is None:
        return 0.0
    shared = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    inside = max(0, shared[0]) * max(0, shared[1])
    return inside / (sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - inside)


# VAE: how near are pictures that it draws again to what they were?

@torch.no_grad()
def through(vae: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the VAE makes of pictures (B, 3, H, W) in [-1, 1]."""
    return vae.decode(vae.encode(x).latent_dist.mode()).sample


def shown(x: torch.Tensor) -> list[Image.Image]:
    rgb = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in rgb]


@torch.no_grad()
def redrawn(run: Path) -> Shares:
    """What the tuned VAE gains on the pictures of datasets/texture_held_out, on those of each texture, and on fresh plain
    scenes."""
    where = ROOT / "datasets" / "texture_held_out"
    lines = [json.loads(line) for line in (where / "metadata.jsonl").read_text().splitlines()]
    held_out = [Image.open(where / line["file_name"]) for line in lines]
    plain = [world.draw(world.random_scene(random.Random(f"plain {i}"))) for i in range(COUNT)]
    family, shares = load("tiny"), {}
    artifact, vae = formats.load(files(run)[0], family.spec), family.parts["vae"]
    for what, some in (("textures", held_out), ("plain", plain)):
        x = 2 * readers.tensor(some) - 1
        before = through(vae, x)
        with families.merged(family.parts, [(artifact, 1.0)]):
            after = through(vae, x)
        for measure, by in ((similarity.psnr, "dB"), (similarity.ssim, "SSIM")):
            gains = measure(after, x) - measure(before, x)
            shares[f"{what} {by}"] = gains.mean().item()
            if (what, by) == ("textures", "dB"):
                shares |= {f"{kind} dB": gains[[line["texture"] == kind for line in lines]].mean().item()
                           for kind in drawings.TEXTURES}
        for part, drawn in (("as drawn", x), ("by the base", before), ("tuned", after)):
            strip(run, f"{what} {part}", shown(drawn[:SHOWN]))
    return shares
