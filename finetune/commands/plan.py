"""Say how much memory a recipe needs, whether it fits, and what would make it fit."""

import json
import re
import textwrap
from dataclasses import asdict

from finetune.commands._base import recipe_arguments
from finetune.commands.status import clock
from finetune.errors import FinetuneError


def add_arguments(parser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--vram", metavar="SIZE",
                        help="the memory that it has to fit in, such as 8GB; this machine's if left out")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args) -> int:
    """0 when it fits, or would with the levers that are named; 2 when it does not."""
    from finetune.recipe import load

    load(args.recipe, args.overrides)
    room = size(args.vram) if args.vram else None
    from finetune import device     # after the recipe is sound: it imports torch

    found = plan(args.recipe, args.overrides, room or device.memory_bytes())
    print(json.dumps(found, indent=1) if args.json else table(found))
    return 0 if found["fits"] or found["smallest"] else 2


def size(text: str) -> int:
    """Bytes of `8GB`, or `8`, which is 8 · 2³⁰ as memory is sold. FinetuneError for what is no size."""
    if not (found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(G|M)?(i?B)?", text, re.IGNORECASE)):
        raise FinetuneError(f"--vram {text}: a size such as 8GB or 6000MB")
    return int(float(found[1]) * 2 ** (20 if found[2] in ("M", "m") else 30))


def plan(recipe: str, overrides: list[str], room: int) -> dict:
    """The need of the recipe, of it with each lever, and the fewest levers that make it fit."""
    import torch

    from finetune import device
    from finetune.recipe import load
    from finetune.train.lean import wanted
    from finetune.train.plan import LEVERS, needs

    def need(levers: list[str]):
        return needs(load(recipe, [*overrides, *levers]).recipe)

    plain, saves = need([]), {}
    now = load(recipe, overrides).recipe
    idle = {"base.quantize=int8": bool(now.base.quantize), "base.quantize=nf4": bool(now.base.quantize),
            "train.lean=true": wanted(now.train, device.best()),
            "train.gradient_checkpointing=selective": now.train.gradient_checkpointing,
            "train.gradient_checkpointing=true": now.train.gradient_checkpointing is True,
            "train.batch_size=1": now.train.batch_size == 1, "base.dtype=bfloat16": now.base.dtype != "float32",
            "train.optimizer=adamw8bit": now.train.optimizer.endswith("8bit"),
            "every.preview=0": not now.every.preview, "data.crop=center": now.data.crop != "random"}
    for lever in LEVERS:
        if not idle[lever]:
            try:
                saves[lever] = plain.peak - need([lever]).peak
            except FinetuneError:       # it does not go with another field of the recipe
                continue
    # One that is enough, the mildest; else from the largest on.
    enough = next(([lever] for lever in saves if plain.peak - saves[lever] <= room), None)
    chosen, peak = [], plain.peak
    for lever in enough or sorted(saves, key=saves.get, reverse=True):
        if peak > room and saves[lever] > 0 and lever.partition("=")[0] not in {c.partition("=")[0] for c in chosen}:
            chosen.append(lever)
            peak = need(chosen).peak
    for lever in chosen[:-1]:       # one that a larger one made needless
        if len(chosen) > 1 and peak <= room and (less := need([c for c in chosen if c != lever]).peak) <= room:
            chosen.remove(lever)
            peak = less
    half = now.train.mixed_precision != "no"
    rate = device.product_rate(torch.bfloat16 if half else torch.float32)
    return {"room": room, "fits": plain.peak <= room, **asdict(plain), "peak": plain.peak, "product_rate": rate,
            "least_seconds": round(plain.flops / rate * now.train.max_steps),
            "levers": [{"set": lever, "saves": saved, "costs": LEVERS[lever]} for lever, saved in saves.items()],
            "smallest": {"set": chosen, "peak": peak} if chosen and peak <= room else None}


def gib(size: int) -> str:
    return f"{size / 2**30:7.2f} GiB" if size >= 2**27 else f"{size / 2**20:7.1f} MiB"


def levers(found: dict) -> list[str]:
    """Lines on what each lever saves and costs."""
    lines = []
    for lever in found["levers"]:
        saved = gib(lever["saves"]) if lever["saves"] > 0 else "    nothing"
        said, indent = f"saves {saved.strip()}; {lever['costs']}", " " * 6
        lines += [f"  --set {lever['set']}", *textwrap.wrap(said, 80, initial_indent=indent, subsequent_indent=indent)]
    return lines


def table(found: dict) -> str:
    """The plan for people, 80 columns wide."""
    lines = [f"weights          {gib(size)}   {part}" for part, size in found["weights"].items()]
    lines += [f"gradients        {gib(found['gradients'])}   of {found['trained']:,} trained numbers",
              f"optimizer        {gib(found['state'])}", "", "at the peak of"]
    lines += [f"  {phase:<15}{gib(size)}" + ("   <- the most" if size == found["peak"] else "")
              for phase, size in found["phases"].items()]
    lines += ["", f"room             {gib(found['room'])}   less what process and driver take"]
    lines += ["", f"a step           {found['flops'] / 1e12:7.2f} TFLOP; products of matrices reach "
                  f"{found['product_rate'] / 1e12:.2f} TFLOP/s here,",
              f"                 so all steps take at least {clock(found['least_seconds'])}"]
    if found["levers"]:
        lines += ["", "levers, each by itself", *levers(found)]
    lines.append("")
    if found["fits"]:
        lines.append("it fits")
    elif found["smallest"]:
        lines += ["it does not fit; it would, with " + gib(found["smallest"]["peak"]).strip() + ", as",
                  *(f"  --set {lever}" for lever in found["smallest"]["set"])]
    else:
        lines.append("it does not fit, and no lever makes it: lower data.resolution")
    return "\n".join(lines)
