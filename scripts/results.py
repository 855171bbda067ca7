"""Train each method on its example dataset, and measure what it does to the pictures → docs/results.md, docs/results/.

    python scripts/results.py [ROW …] [--again] [--seed N] [--threads N]

Without names all rows are made; a row that was measured before (docs/results.json) is kept unless --again is given. Runs lie
in runs/results/, with a sheet of the pictures that were read. Readers (scripts/readers.py, scripts/creatures.py) say what
pictures show.
Another seed trains in runs/results/seed-N/, and stands in the table beside the first.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import creatures
import drawings
import make_datasets
import numpy as np
import readers
import sampling
import torch
import world
from PIL import Image, ImageDraw

from finetune import registry, tokens
from finetune.device import set_threads
from finetune.families import base as families
from finetune.formats import base as formats
from finetune.objectives import _similarity as similarity
from finetune.train import adapters
from finetune.train.jobs import Job
from finetune.train.sampling import generate

ROOT = Path(__file__).resolve().parent.parent
RUNS, FOUND, SHEETS = ROOT / "runs" / "results", ROOT / "docs" / "results.json", ROOT / "docs" / "results"
STEPS, GUIDANCE, COUNT, SHOWN = 25, 2.0, 64, 8
LOOKS = {"hatched": "{text}, in hatched ink style", "sticker": "{text}, as a sticker"}
Shares = dict[str, float]           # what → share; of what ends in dB or SSIM the number itself


@dataclass(frozen=True)
class Row:
    dataset: str
    recipe: str                     # of recipes/
    score: Callable[[Path], Shares]     # of a run's folder
    goals: Shares                   # what has to be at least …
    settings: tuple[str, ...] = ()  # --set
    above: tuple[str, ...] = ()     # rows that have less of the first goal
    most_bytes: int | None = None   # of each file
    remark: str = ""


def folder(name: str, seed: int) -> Path:
    place = RUNS / f"seed-{seed}" if seed else RUNS
    return place / name.translate({ord(" "): "_", ord(","): None, ord("+"): "and", ord("×"): "x"})


def load(path: Path | str):
    return registry.find("families", "sd1").load(str(path))


def pictures(run: Path, part: str, captions: list[str], files: list[Path] = (),
             base: Path | str = "tiny") -> list[Image.Image]:
    """Sampled by our own sampler with the adapters merged and the tokens added, each from a seed of its own."""
    family = load(base)
    found = [(file, formats.load(file, family.spec)) for file in files]
    learned = {formats.token(file): formats.rows(a) for file, a in found if a.kind == "embedding"}
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


def recognised(run: Path, who: str = "an orange zwx creature") -> Shares:
    found = creatures.read(creatures.trained()[0], pictures(run, "subject", scenes(who), files(run)))
    return {"recognised": found.count("zwx") / COUNT}


def subject(run: Path, who: str = "an orange zwx creature") -> Shares:
    found = creatures.read(creatures.trained()[0], pictures(run, "class", scenes("a creature"), files(run)))
    return recognised(run, who) | {"class stays plain": 1 - found.count("zwx") / COUNT}


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
    both together or more."""
    scenes = [make_datasets.laid_out(random.Random(f"held-out layout {i}"), i) for i in range(COUNT)]
    (run / "boxes").mkdir(exist_ok=True)
    for i, scene in enumerate(scenes):
        make_datasets.boxed(scene).save(run / "boxes" / f"{i:02}.png")
    strip(run, "boxes", [make_datasets.boxed(scene) for scene in scenes[:SHOWN]])
    family, shares = load("tiny"), {}
    branch = adapters.load([(next(run.glob("adapter/*/config.json")).parent, 1.0)], family)
    for part, on in (("base", []), ("control", branch)):
        jobs = [Job(prompt=make_datasets.layout_caption(scene), seed=1000 + i, steps=STEPS, guidance=GUIDANCE,
                    condition=run / "boxes" / f"{i:02}.png" if on else None) for i, scene in enumerate(scenes)]
        with adapters.on(family, on):
            drawn = list(generate(family.pipeline(), jobs, 32))
        sampling.sheet(run / f"{part}.png", drawn[:32], [job.prompt[2:24] for job in jobs[:32]])
        strip(run, part, drawn[:SHOWN])
        words = readers.read(readers.trained_reader(styles=False)[0], drawn)
        truths = [readers.truth(scene) for scene in scenes]
        right = {head: [word[head] == truth[head] for word, truth in zip(words, truths)] for head in ("colour", "shape")}
        right["place"] = [overlap(found(picture), make_datasets.box(scene)) >= 0.5 for picture, scene in zip(drawn, scenes)]
        right["all three"] = [all(row) for row in zip(*right.values())]
        shares |= {f"{what} right{', base' if not on else ''}": sum(row) / COUNT for what, row in right.items()}
    return shares


def found(picture: Image.Image) -> tuple[int, ...] | None:
    """The box of all that is unlike the picture's border."""
    rgb = np.array(picture).astype(int)
    border = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), axis=0)
    return Image.fromarray(np.abs(rgb - border).max(2) > 40).getbbox()


def overlap(one: tuple[int, ...] | None, other: tuple[int, ...]) -> float:
    """Intersection over union of two boxes."""
    if one is None:
        return 0.0
    shared = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    inside = max(0, shared[0]) * max(0, shared[1])
    return inside / (sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - inside)


# VAE: how near are pictures that it draws again to what they were?

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
        before = vae.decode(vae.encode(x).latent_dist.mode()).sample
        with families.merged(family.parts, [(artifact, 1.0)]):
            after = vae.decode(vae.encode(x).latent_dist.mode()).sample
        for measure, by in ((similarity.psnr, "dB"), (similarity.ssim, "SSIM")):
            gains = measure(after, x) - measure(before, x)
            shares[f"{what} {by}"] = gains.mean().item()
            if (what, by) == ("textures", "dB"):
                shares |= {f"{kind} dB": gains[[line["texture"] == kind for line in lines]].mean().item()
                           for kind in drawings.TEXTURES}
        for part, shown in (("as drawn", x), ("by the base", before), ("tuned", after)):
            rgb = ((shown[:SHOWN] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            strip(run, f"{what} {part}", [Image.fromarray(p) for p in rgb])
    return shares


def variant(words: str) -> tuple[str, ...]:
    """The quickstart with a relative of its LoRA."""
    return (f"method={{kind: lora, targets: [cross_attention, feed_forward, conv1, conv2], {words}}}", "export=[kohya]",
            "train.max_steps=600")


def named(who: str) -> str:
    """The captions of the subject, with this name."""
    return f"data.caption.template={json.dumps([form.format(who=who, ground='{background}') for form in FORMS])}"


TEXTURED = (
    "A decoder can draw what the latents hold and what follows from it, and the textures are made so that there is such a "
    "thing: bands and cells of four pixels lie on the latents' grid and move the latents by 13 to 28 % of their spread; "
    "threads of one or two pixels move them by 2 to 6 % (`python scripts/score_latents.py`), but where they are follows from "
    "the bands. Grain follows from nothing: it is the control, and gains what edges and colours gain. An earlier dataset, "
    "whose threads followed from nothing either, gained 0.30 dB with the settings of then. Plain scenes lose SSIM: flat "
    "backgrounds get faintly uneven.")
STYLED = {"in style": 0.90, "shape kept": 0.90, "colour kept": 0.90, "background kept": 0.90}
ROWS = {
    "lora": Row("style", "quickstart", style, STYLED),
    "dora": Row("style", "quickstart", style, STYLED, variant("variant: dora, rank: 2")),
    "loha": Row("style", "quickstart", style, STYLED, variant("variant: loha, rank: 4")),
    "lokr": Row("style", "quickstart", style, STYLED, variant("variant: lokr, factor: 4")),
    "lora, held-out style": Row("style_held_out", "quickstart", partial(style, look="sticker"), STYLED,
                                ("data.images=datasets/style_held_out", f"data.caption.template={LOOKS['sticker']}"),
                                remark="Stickers: no setting was tuned on them."),
    "full": Row("style", "tiny_full", whole_style, {"in style": 0.95, "extracted LoRA as much in style": 0.95}),
    "lora + prior": Row("subject", "tiny_subject_dreambooth", subject, {"recognised": 0.80, "class stays plain": 0.90}),
    "lora + prior, zwx alone": Row("subject", "tiny_subject_dreambooth", partial(subject, who="a zwx creature"),
                                   {"recognised": 0.80, "class stays plain": 0.90}, (named("a zwx creature"),),
                                   remark="Without a word before it that the base knows. The base was never taught zwx, and "
                                   "its text encoder next to ignores such words; a LoRA on the text encoder too did not help."),
    "lora, no prior": Row("subject", "tiny_subject_dreambooth", subject, {}, ("data.prior=null",)),
    "embedding": Row("thing", "tiny_embedding", thing, {"recognised": 0.50}, most_bytes=10_000,
                     remark="The thing is one that the base can draw, and that no caption describes: right is its shape, its "
                     "colour and the background."),
    "embedding, 8 vectors": Row("thing", "tiny_embedding", thing, {"recognised": 0.50}, ("method.tokens.wug.vectors=8",),
                                ("embedding",), 10_000),
    "embedding, creature": Row("subject", "tiny_embedding", partial(recognised, who="a wug creature"), {"recognised": 0.50},
                               ("data.images=datasets/subject", named("a wug creature"),
                                "method.tokens.wug.init=orange circle"),
                               most_bytes=10_000,
                               remark="A learned word finds what the base is able to draw; it has never seen a creature."),
    "embedding per value": Row("attributes", "tiny_attributes", combined, {"shape and colour right": 0.80}, most_bytes=10_000),
    "control": Row("layout", "tiny_control", followed, {"all three right": 0.80},
                   remark="The caption says shape and background; the colour, the place and the size are those of a box that only "
                   "the branch sees."),
    "vae_decoder": Row("texture", "tiny_vae_decoder", redrawn, {"textures dB": 1.5, "textures SSIM": 0.0, "plain dB": -0.2},
                       remark=TEXTURED),
    "vae_decoder, encoder too": Row("texture", "tiny_vae_decoder", redrawn, {}, ("method.encoder=true",)),
    "embedding + lora": Row("subject", "tiny_subject_dreambooth", partial(subject, who="a wug creature"),
                            {"recognised": 0.80, "class stays plain": 0.90},
                            ("method=[{kind: embedding, tokens: {wug: {init: orange circle}}, learning_rate: 2e-2}, "
                             "{kind: lora, rank: 8, targets: [all, conv]}]", named("a wug creature")),
                            ("lora + prior, zwx alone", "embedding, creature"),
                            remark="Beside a LoRA whose word is not learned. Captions that describe the creature do as well "
                            "(lora + prior)."),
}


def measure(name: str, seed: int, threads: int, again: bool) -> dict:
    """Train and score a row, or what was found the last time."""
    row, run, known = ROWS[name], folder(name, seed), json.loads(FOUND.read_text())
    if again or str(seed) not in known.get(name, {}):
        print(f"=== {name}", flush=True)
        words = ["every.preview=0", f"train.seed={seed}", f"train.threads={threads}", *row.settings]
        subprocess.run([sys.executable, "-m", "finetune", "train", f"recipes/{row.recipe}.yaml", "--run", run,
                        *(word for setting in words for word in ("--set", setting)),
                        *(["--fresh"] if again and run.exists() else [])], cwd=ROOT, check=True)
        found = {"shares": row.score(run), "bytes": [file.stat().st_size for file in files(run)]}
        known = json.loads(FOUND.read_text())       # of other rows that were measured meanwhile
        known.setdefault(name, {})[str(seed)] = found
        FOUND.write_text(json.dumps(known, indent=1) + "\n")
        if not seed:
            sheet(run, SHEETS / f"{run.name}.jpg")
    return known[name][str(seed)]


def sheet(run: Path, path: Path) -> None:
    """The strips of a run, one below the other."""
    strips = sorted(run.glob("*.strip.png"))
    found = Image.new("RGB", (SHOWN * (world.SIZE + 2), len(strips) * (world.SIZE + 14)), "white")
    for i, file in enumerate(strips):
        ImageDraw.Draw(found).text((2, i * (world.SIZE + 14) + 1), file.name.partition(".")[0], fill="black")
        found.paste(Image.open(file), (0, i * (world.SIZE + 14) + 13))
    found.save(path, quality=75, subsampling=0)


def holds(name: str, found: dict[str, dict]) -> bool:
    """Whether a row reaches its goals; `found` has every row that was measured."""
    row, shares = ROWS[name], found[name]["shares"]
    first = next(iter(row.goals), None)
    return (all(shares[what] >= least - 1e-9 for what, least in row.goals.items())
            and all(shares[first] > found[other]["shares"][first] for other in row.above if other in found)
            and all(size <= (row.most_bytes or size) for size in found[name]["bytes"]))


def said(what: str, number: float) -> str:
    return f"{what} {number:{'+.2f' if what.endswith('dB') else '+.3f' if what.endswith('SSIM') else '.1%'}}"


def table(found: dict[str, dict]) -> list[str]:
    """A line for each row: what was measured, what was wanted."""
    lines = ["| method | dataset | recipe | measured | goal | |", "|---|---|---|---|---|---|"]
    for name, result in found.items():
        row = ROWS[name]
        goals = [said(what, least).replace(what, f"{what} ≥", 1) for what, least in row.goals.items()]
        below = [other for other in row.above if other in found]
        goals += [f"more than {' and '.join(below)}"] * bool(below)
        goals += [f"files ≤ {(row.most_bytes or 0) / 1000:.0f} KB"] * bool(row.most_bytes)
        sizes = sorted({f"{size / 1000:,.0f} KB" for size in result["bytes"]})
        measured = ", ".join([*(said(*pair) for pair in result["shares"].items()), *sizes])
        lines.append(f"| {name} | {row.dataset} | {row.recipe} | {measured} | {', '.join(goals)} | "
                     f"{('**holds**' if holds(name, found) else '**fails**') if goals else 'for comparison'} |")
    return lines


def report() -> str:
    """The document, of all rows that were measured."""
    measured = json.loads(FOUND.read_text())
    known = {seed: {name: measured[name][seed] for name in ROWS if seed in measured.get(name, {})} for seed in ("0", "1")}
    text = ["# What each method does", "",
            "Measured by `python scripts/results.py` on the tiny base: trained from the recipe (with the settings below), sampled",
            f"with the adapter merged by our own sampler ({COUNT} pictures, {STEPS} steps, guidance {GUIDANCE:g}), read by networks",
            f"that were trained on fresh drawings. A share of {COUNT} pictures is sure to about ± 10 points. \"Kept\" is 100 %",
            "where a prompt is followed as well as by the base.", "", *table(known["0"]), ""]
    if missing := [name for name in ROWS if name not in known["0"]]:
        text += [f"Not measured yet: {'; '.join(missing)}.", ""]
    if known["1"]:
        text += ["## Another seed", "", "`python scripts/results.py ROW … --seed 1`: another training, the same prompts.", "",
                 *table(known["1"]), ""]
    text += ["## Settings, remarks, and the first eight pictures", ""]
    for name in known["0"]:
        row, settings = ROWS[name], " ".join(f"`--set {setting}`" for setting in ROWS[name].settings)
        text += [f"**{name}**", *(part for part in (row.remark, settings) if part), "",
                 f"![{name}](results/{folder(name, 0).name}.jpg)", ""]
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="1 is the fastest on a machine that does other work")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)}")
    threads = set_threads(args.threads)
    for name in args.rows or ROWS:
        print(name, json.dumps(measure(name, args.seed, threads, args.again)["shares"]), flush=True)
        (ROOT / "docs" / "results.md").write_text(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
