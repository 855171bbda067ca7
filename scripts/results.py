"""Train each method on its example dataset, and measure what it does to the pictures → docs/results.md, docs/results/.

    python scripts/results.py [ROW …] [--again] [--seed N] [--threads N]

Without names all rows are made; a row that was measured before (docs/results.json) is kept unless --again is given. Runs lie
in runs/results/, with the pictures that were read; scripts/effects.py measures them.
Another seed trains in runs/results/seed-N/, and stands in the table beside the first.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import world
from effects import (
    COUNT, FORMS, GUIDANCE, LOOKS, ROOT, RUNS, SHOWN, STEPS, Shares, combined, files, followed, recognised, redrawn, style, subject,
    thing, whole_style,
)
from PIL import Image, ImageDraw

from finetune.device import set_threads

FOUND, SHEETS = ROOT / "docs" / "results.json", ROOT / "docs" / "results"


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
    "backgrounds get faintly uneven. The settings were chosen, and one texture was changed, by the same held-out pictures that "
    "the row is scored on: it is no untouched test.")
STYLED = {"in style": 0.90, "shape kept": 0.90, "colour kept": 0.90, "background kept": 0.90}
ROWS = {
    "lora": Row("style", "quickstart", style, STYLED),
    "dora": Row("style", "quickstart", style, STYLED, variant("variant: dora, rank: 2")),
    "loha": Row("style", "quickstart", style, STYLED, variant("variant: loha, rank: 4")),
    "lokr": Row("style", "quickstart", style, STYLED, variant("variant: lokr, factor: 4")),
    "lora, held-out style": Row("style_held_out", "quickstart", partial(style, look="sticker"), STYLED,
                                ("data.images=datasets/style_held_out",
                                 f"data.caption.template={json.dumps(LOOKS['sticker'])}"),
                                remark="Stickers: no setting was tuned on them."),
    "full": Row("style", "tiny_full", whole_style, {"in style": 0.95, "extracted LoRA as much in style": 0.95}),
    "lora + prior": Row("subject", "tiny_subject_dreambooth", subject, {"recognised": 0.80, "class stays plain": 0.90}),
    "lora + prior, zwx alone": Row("subject", "tiny_subject_dreambooth", partial(subject, who="a zwx creature"),
                                   {"recognised": 0.80, "class stays plain": 0.90}, (named("a zwx creature"),),
                                   remark="Without a word before it that the base knows. The base was never taught zwx, and "
                                   "its text encoder next to ignores such words; a LoRA on the text encoder too did not help."),
    "lora + prior, held-out subject": Row("subject_held_out", "tiny_subject_dreambooth",
                                          partial(subject, who="a green sks creature", name="sks"),
                                          {"recognised": 0.80, "class stays plain": 0.90},
                                          ("data.images=datasets/subject_held_out", named("a green sks creature")),
                                          remark="Another creature: no setting was tuned on it."),
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
                   "the branch sees, and follow from nothing else. Truth is the scenes as drawn, through the VAE: the most that "
                   "can be. No setting was chosen on these scenes."),
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
