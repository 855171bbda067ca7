"""Train what a recipe says; the same command again continues a stopped run."""

import json
import os
import re
import shutil
import sys
from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("recipe", help="a recipe file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="overrides",
                        help="override a field of the recipe; can be repeated")
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run folder; runs/NAME of the recipe by default")
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder aside and start anew")


def run(args) -> int:
    from finetune.errors import FinetuneError
    from finetune.recipe import load
    from finetune.runfolder import RunFolder
    from finetune.train import processes

    loaded = load(args.recipe, args.overrides)
    processes.start_missing()
    name = Path(args.recipe).stem
    folder = RunFolder(args.run or Path("runs") / name, name)
    try:
        return _train(loaded.recipe, args, folder)
    except FinetuneError as e:
        # A problem that names a field is found by its line.
        key = re.match(r"[a-z_]+(\.[a-z_0-9]+)*(?=: )", str(e))
        raise FinetuneError(f"{loaded.at(key[0])}  {e}" if key else str(e)) from e


def _train(recipe, args, folder) -> int:
    from contextlib import nullcontext

    from finetune.recipe import dump
    from finetune.runfolder import write_json, write_text
    from finetune.train import export, loop, setup

    accelerator = setup.accelerate(recipe)
    main = accelerator.is_main_process
    log = []

    def say(line: str) -> None:
        if main:
            print(line, file=sys.stderr, flush=True)
            log.append(line)

    if main:
        folder.lock()
    run = setup.prepare(recipe, folder, accelerator, say)
    if args.fresh and main and folder.root.exists():
        say(f"{folder.root} is moved aside to {folder.set_aside()}")
    accelerator.wait_for_everyone()
    if folder.begun():
        check_identity(json.loads(folder.identity.read_text()), run.identity, folder, say)
    accelerator.wait_for_everyone()
    if main:
        folder.create(needed_bytes(run))
        shutil.copyfile(args.recipe, folder.recipe)
        write_text(folder.resolved, dump(recipe))
        write_json(folder.identity, run.identity)
    accelerator.wait_for_everyone()
    start, window = loop.resume(run)
    if start:
        say(f"continues after step {start} of {recipe.train.max_steps}")
    if main:
        with open(folder.log, "a", encoding="utf-8") as f:
            f.write("\n".join(log) + "\n")
    try:
        loop.train(run, start, window)
    except loop.Stopped as e:
        say("stopped and saved; the same command continues")
        return 128 + e.number
    if main:
        with run.ema.swapped() if run.ema else nullcontext():
            artifact = run.method.export(export.metadata(
                run.identity["exact"]["recipe"], run.family.source.name, Path(recipe.data.images).name, folder.name, recipe.train.max_steps,
                len(run.loader.examples), accelerator.num_processes, run.identity["exact"]["data"]))
        for path in export.write(artifact, folder, recipe.export, run.family.spec):
            say(f"adapter   {path} ({os.path.getsize(path) / 1000:,.0f} KB)")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def check_identity(old: dict, new: dict, folder, say) -> None:
    """Raise FinetuneError, with the differences, when the run in this folder is another one."""
    from finetune.errors import FinetuneError
    from finetune.recipe import difference

    differences = difference(old["exact"], new["exact"])
    if differences:
        raise FinetuneError("\n    ".join([f"{folder.root} holds a run that this one cannot continue:", *differences,
                            "--fresh moves it aside and starts anew; --run DIR starts beside it"]))
    for line in difference(old["rounding"], new["rounding"]):
        say(f"note: the run began with another {line}: the last digits may differ")


def needed_bytes(run) -> int:
    """An upper estimate of what the run writes: checkpoints (one more than are kept), adapters, previews and log."""
    trained = sum(p.numel() * 4 for p in run.method.parameters().values())
    per_checkpoint = trained * (4 if run.ema else 3)
    return per_checkpoint * (run.recipe.train.keep_checkpoints + 1) + trained * len(run.recipe.export) + 20_000_000
