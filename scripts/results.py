"""Train each method on its example dataset, and measure what it does to the pictures → docs/results.md.

    python scripts/results.py [ROW …] [--again]

Without names all rows are made; a row that was measured before is kept unless --again is given. Runs lie in runs/results/,
with a sheet of the pictures that were read. Readers (scripts/readers.py, scripts/creatures.py) say what pictures show.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import creatures
import readers
import sampling
import torch
import world

from finetune import registry
from finetune.families import base as families
from finetune.formats import base as formats

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "results"
STEPS, GUIDANCE, COUNT = 25, 2.0, 64
HATCHED = "{text}, in hatched ink style"


@dataclass(frozen=True)
class Row:
    recipe: str                     # of recipes/
    settings: tuple[str, ...]       # --set
    score: Callable                 # (row's name, its adapter files) → {what: share}
    goals: dict[str, float]         # what has to be at least …
    dataset: str


def pictures(name: str, files: list[Path], captions: list[str], template: str = "{text}") -> list:
    """Sampled by our own sampler with the adapters merged, one picture a caption, each from a seed of its own."""
    family = registry.find("families", "sd1").load("tiny")
    adapters = [(formats.load(file, family.spec), 1.0) for file in files]
    asked = [sampling.Order(caption, {}, 1000 + i) for i, caption in enumerate(captions)]
    with ExitStack() as stack:
        if adapters:
            stack.enter_context(families.merged(family.parts, adapters))
        pipe = family.pipeline()
        pipe.set_progress_bar_config(disable=True)
        found = sampling.sample(pipe, asked, STEPS, GUIDANCE, template)
    sampling.sheet(RUNS / f"{name}.png", found[:32], [template.format(text=caption)[:22] for caption in captions[:32]])
    return found


def style(name: str, files: list[Path]) -> dict[str, float]:
    """Share in the style; and shape, colour and background less the base's share of them."""
    reader, _ = readers.trained_reader(styles=True)
    asked = sampling.orders(COUNT)
    shares = {}
    for who, some in (("base", []), (name, files)):
        found = readers.read(reader, pictures(f"{name}.{who}" if not some else name, some, [o.caption for o in asked], HATCHED))
        shares[who] = {head: score["share"] for head, score in sampling.count_right(asked, found).items()}
        shares[who]["in style"] = sum(words["style"] == "hatched" for words in found) / len(found)
    kept = {f"{head} kept": 1 + shares[name][head] - shares["base"][head] for head in sampling.ATTRIBUTES}
    return {"in style": shares[name]["in style"]} | kept


def subject(name: str, files: list[Path], word: str = "zwx creature") -> dict[str, float]:
    """Share of new scenes with the character, and of pictures of its class without it."""
    reader, _ = creatures.trained()
    grounds = [list(world.BACKGROUNDS)[i % 8] for i in range(COUNT)]
    forms = ["a picture of {who} on a {ground} background", "{who} on a {ground} background",
             "a drawing of {who} against a {ground} background"]

    def read(who: str, part: str) -> list[str]:
        captions = [forms[i % 3].format(who=who, ground=ground) for i, ground in enumerate(grounds)]
        return creatures.read(reader, pictures(f"{name}.{part}", files, captions))

    shown, others = read(word, "subject"), read("a creature", "class")
    return {"recognised": shown.count("zwx") / COUNT, "class stays plain": 1 - others.count("zwx") / COUNT}


def variant(words: str) -> tuple[str, ...]:
    return (f"method={{kind: lora, targets: [cross_attention, feed_forward, conv1, conv2], {words}}}", "every.preview=0",
            "export=[kohya]")


STYLED = {"in style": 0.90, "shape kept": 0.90, "colour kept": 0.90, "background kept": 0.90}
ROWS = {
    "lora": Row("quickstart", variant("rank: 2"), style, STYLED, "style"),
    "dora": Row("quickstart", variant("variant: dora, rank: 2"), style, STYLED, "style"),
    "loha": Row("quickstart", variant("variant: loha, rank: 4"), style, STYLED, "style"),
    "lokr": Row("quickstart", variant("variant: lokr, factor: 4"), style, STYLED, "style"),
    "lora + prior": Row("tiny_subject_dreambooth", ("every.preview=0",), subject,
                        {"recognised": 0.80, "class stays plain": 0.90}, "subject"),
    "lora, no prior": Row("tiny_subject_dreambooth", ("every.preview=0", "data.prior=null"), subject, {}, "subject"),
}


def measure(name: str, again: bool) -> dict:
    """Train and score a row, or what was found the last time."""
    row, run = ROWS[name], RUNS / name.replace(" ", "").replace("+", "_").replace(",", "_")
    kept = run / "score.json"
    if again or not kept.exists():
        print(f"=== {name}", flush=True)
        command = [sys.executable, "-m", "finetune", "train", f"recipes/{row.recipe}.yaml", "--run", run]
        words = [word for setting in row.settings for word in ("--set", setting)]
        subprocess.run([*command, *words, *(["--fresh"] if again and run.exists() else [])], cwd=ROOT, check=True)
        files = sorted(file for file in (run / "adapter").glob("*.safetensors"))
        found = {"shares": row.score(run.name, files), "bytes": {file.name: file.stat().st_size for file in files}}
        kept.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(kept.read_text())


def report(found: dict[str, dict]) -> str:
    lines = ["# What each method does", "",
             "Measured by `python scripts/results.py` on the tiny base: trained from the recipe, sampled with the adapter merged by our",
             f"own sampler ({COUNT} pictures, {STEPS} steps, guidance {GUIDANCE:g}), read by networks that were trained on fresh",
             "drawings. \"Kept\" is 100 % where prompts are followed as well as by the base.", "",
             "| method | dataset | recipe | measured | goal | size |", "|---|---|---|---|---|---|"]
    for name, result in found.items():
        row = ROWS[name]
        said = ", ".join(f"{what} {share:.1%}" for what, share in result["shares"].items())
        goal = ", ".join(f"{what} ≥ {share:.0%}" for what, share in row.goals.items())
        holds = all(result["shares"][what] >= share - 1e-9 for what, share in row.goals.items())
        size = ", ".join(f"{size / 1000:,.0f} KB" for size in result["bytes"].values())
        lines.append(f"| {name} | {row.dataset} | {row.recipe} | {said} | {goal and ('**holds**: ' if holds else '**fails**: ') + goal} "
                     f"| {size} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)}")
    torch.set_num_threads(2)
    for name in args.rows or ROWS:
        print(name, json.dumps(measure(name, args.again)["shares"]), flush=True)
    files = {name: RUNS / name.replace(" ", "").replace("+", "_").replace(",", "_") / "score.json" for name in ROWS}
    text = report({name: json.loads(file.read_text()) for name, file in files.items() if file.exists()})
    (ROOT / "docs" / "results.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
